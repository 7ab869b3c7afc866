"""Builds an image in the engine and follows its log."""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import BackendError, BackendUnavailable
from trimtab.images import context, wheels
from trimtab.images.plan import LABEL, Plan, build_command
from trimtab.images.present import ENGINE_REMEDY, check, look_up, using

if TYPE_CHECKING:
    from docker import DockerClient

_WRONG_PYTHON = 86  # the Dockerfiles' exit code for a base without the right Python
_DISK_FULL = "no space left on device"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Progress:
    """A step of a build that begins: the `step`-th of `of`, from 1."""

    step: int
    of: int
    command: str


def build(
    device: str,
    target: str = "train",
    *,
    base: str | None = None,
    find_links: Path | None = None,
    offline: bool = False,
    arguments: Mapping[str, str] | None = None,
    client: DockerClient | None = None,
    say: Callable[[str], None] = print,
    show: Callable[[Progress], None] = lambda progress: None,
    force: bool = False,
    cpus: str | None = None,
) -> str:
    """Build an image, or find it built, and return its tag.

    `base` is the image that it stands on (default: `TRIMTAB_BASE_IMAGE`, else the Dockerfile's). `find_links` is a folder of wheels for
    pip, served to the build on loopback; for xeon's train image it is by default the folder of pip's configured find-links that holds a
    CPU build of torch, if there is one. `offline` takes packages from there alone. `arguments` are further ARGs of the Dockerfile.
    `force` builds although the image is there, without the engine's cache. `say` gets the log, `show` the steps; `cpus` binds the build,
    such as "0,1".

    Raises SpecError for what there is not, BackendUnavailable without an engine, BackendError with the remedy when the build fails.
    """
    plan = Plan.of(device, target, base, arguments)
    again = build_command(device, target)
    with contextlib.ExitStack() as while_building:
        client = while_building.enter_context(using(client))
        there = look_up(client, plan.tag)
        if not force and there is not None and there.labels.get("context") == plan.digest:
            check(there, client)
            say(f"image: {plan.tag} is there")
            return plan.tag
        with_torch = (device, target) == ("xeon", "train")
        if find_links is None and with_torch and (find_links := wheels.configured("torch-*+cpu-*.whl")) is not None:
            say(f"image: wheels from {find_links}: pip's find-links, with a CPU build of torch")
        if offline and find_links is None:
            raise BackendError("an offline build takes its packages from a folder of wheels: name it with --find-links")
        say(f"image: building {plan.tag} on {plan.base}")
        if with_torch:
            say(f"image: {context.said_of_kernels(plan.files)}")
        extra: dict[str, Any] = {}
        passed = {"BASE": plan.base, **plan.arguments}
        if find_links is not None:
            passed["PIP_FIND_LINKS"] = while_building.enter_context(wheels.served(find_links))
            passed |= past_the_proxy(
                importlib.import_module("docker.utils.config").load_general_config().get("proxies", {}), client.api.base_url
            )
            passed |= {"PIP_NO_INDEX": "1"} if offline else {}
            extra["network_mode"] = "host"  # the folder is served on the loopback of the engine's machine, and nowhere else
        if cpus is not None:
            extra["container_limits"] = {"cpusetcpus": cpus}
        begin = functools.partial(
            client.api.build,
            fileobj=context.archive(plan.files),
            custom_context=True,
            tag=plan.tag,
            target=target,
            buildargs=passed,
            labels={f"{LABEL}{name}": value for name, value in plan.labels().items()},
            nocache=force,
            rm=True,
            forcerm=True,
            decode=True,
            **extra,
        )
        last: deque[str] = deque(maxlen=40)
        for line in read(begin, "the build", lambda error: failure(error, last, plan, again)):
            last.append(line)
            if step := re.match(r"Step (\d+)/(\d+) : (.*)", line):
                show(Progress(int(step[1]), int(step[2]), step[3]))
            say(line)
    return plan.tag


def past_the_proxy(proxies: Mapping[str, Mapping[str, str]], engine: str) -> dict[str, str]:
    """Build arguments by which a build speaks to 127.0.0.1 itself, whatever proxies docker's client configuration gives it.

    `proxies` is that configuration's part of the name; of it holds what stands under the engine's address, else under "default". What
    it exempts stays exempt: an argument of ours would replace its own.
    """
    exempt = proxies.get(engine, proxies.get("default", {})).get("noProxy")
    value = ",".join(filter(None, [exempt, "127.0.0.1"]))
    return {"NO_PROXY": value, "no_proxy": value}


def read(begin: Callable[[], Iterable[dict[str, Any]]], doing: str, explain: Callable[[str], str]) -> Iterator[str]:
    """The lines of what an engine says while it does what `begin` asks of it.

    Raises BackendError in the words of `explain` where it says an error, BackendUnavailable where it goes away while `doing` it.
    """
    errors = importlib.import_module("docker.errors")
    try:
        for answer in begin():
            if "error" in answer:
                raise BackendError(explain(str(answer["error"])))
            text = str(answer.get("stream") or answer.get("status") or "")
            for line in _COLOUR.sub("", text).splitlines():
                if line.strip():
                    yield line.rstrip()
    except errors.APIError as exc:
        raise BackendError(explain(str(exc.explanation or exc))) from exc
    except (errors.DockerException, OSError) as exc:
        raise BackendUnavailable(f"the Docker engine went away during {doing} ({exc}): {ENGINE_REMEDY}") from exc


def failure(error: str, last: Iterable[str], plan: Plan, again: str) -> str:
    """What a failed build is told as: from the engine's error and the last lines of the log, ending with what to do."""
    base = plan.base
    log = "\n  ".join(line for line in last if not line.startswith(("Step ", " ---> ", "Removing intermediate")))
    if _DISK_FULL in f"{error}\n{log}".lower():
        return f"the disk of the Docker engine is full: make room there (docker system prune) and build again:  {again}"
    if f"non-zero code: {_WRONG_PYTHON}" in error or ("non-zero code: 127" in error and "import sys" in error):
        return f"the base image {base} has no Python 3.11 or 3.12: name one that has:  {again} --base {plan.usual_base}"
    if "non-zero code" not in error:
        return f"the build stopped ({error.strip()}): is the base image {base} here, or within reach? Name another:  {again} --base IMAGE"
    code = re.search(r"non-zero code: \d+", error)
    return f"the image could not be built ({code and code[0]}); its last lines were:\n  {log}\nMend that and build again:  {again}"
