"""Sizes, build times and start times of the images, against their ceilings:  python benchmarks/images.py --check

The Xeon images are built where they are not there; the GPU train image is measured where it is. What was not measured is named. Starts are
those of a container as the docker backend makes one: no network, a read-only root, the caller's user. The first step, and the first
answer, is one of a random model of two million parameters, so that it is the start that is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab import images
from trimtab.errors import BackendUnavailable, TrimtabError
from trimtab.layout import SERVE_VARIABLE
from trimtab.spec import ServeSpec

if TYPE_CHECKING:
    from docker import DockerClient

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # for the tiny model

# What must not be passed. Sizes in MB (10^6 bytes); seconds are for two cores with nothing else to do, with room to spare.
CEILINGS = {
    "size of the Xeon train image": (1500.0, "MB"),
    "size of the Xeon serve image": (500.0, "MB"),
    "size of the GPU train image": (6000.0, "MB"),
    "build from nothing": (600.0, "s"),
    "serve build from nothing": (120.0, "s"),
    "build when nothing changed": (5.0, "s"),
    "start to the usage line": (5.0, "s"),
    "start to the first step": (20.0, "s"),
    "start to the first answer": (10.0, "s"),
}


@dataclass(frozen=True)
class Figure:
    name: str
    value: float
    ceiling: float
    unit: str

    @property
    def kept(self) -> bool:
        return self.value <= self.ceiling

    def line(self) -> str:
        return f"{self.name:<29} {self.value:>8.1f} {self.unit:<2}  ceiling {self.ceiling:>6.0f}  {'kept' if self.kept else 'MISSED'}"


def figure(name: str, value: float) -> Figure:
    return Figure(name, round(value, 2), *CEILINGS[name])


def not_measured(found: list[Figure]) -> list[str]:
    """A line for each ceiling without a figure: why, and what to type to have it."""
    why = {
        "build from nothing": "it takes minutes: add --cold",
        "serve build from nothing": "it takes a minute: add --cold",
        "size of the GPU train image": "there is none of these sources here:  trimtab image build gpu",
    }
    absent = [name for name in CEILINGS if name not in {one.name for one in found}]
    return [f"{name:<29} NOT MEASURED  {why[name]}" for name in absent]


def measure(*, base: str | None, cold: bool, repeats: int) -> list[Figure]:
    """All figures that can be taken; the start times are medians of `repeats`."""
    with contextlib.closing(images.engine()) as client:
        quietly: Callable[[str], None] = lambda line: None  # noqa: E731
        found = []
        if cold:
            for name, target in {"build from nothing": "train", "serve build from nothing": "serve"}.items():
                began = time.monotonic()
                images.build("xeon", target, base=base, client=client, say=quietly, force=True)
                found.append(figure(name, time.monotonic() - began))
        aloud: Callable[[str], None] = lambda line: print(line, file=sys.stderr)  # noqa: E731
        tag = images.build("xeon", base=base, client=client, say=aloud)
        server = images.build("xeon", "serve", base=base, client=client, say=aloud)
        began = time.monotonic()
        images.build("xeon", base=base, client=client, say=quietly)
        found.append(figure("build when nothing changed", time.monotonic() - began))
        found.append(figure("size of the Xeon train image", images.inspect(tag, client).size / 1e6))
        found.append(figure("size of the Xeon serve image", images.inspect(server, client).size / 1e6))
        with contextlib.suppress(BackendUnavailable):
            found.append(figure("size of the GPU train image", images.find("gpu", client=client).size / 1e6))
        usage = [until(client, tag, None, ["no-such-verb"], "usage:") for _ in range(repeats)]
        found.append(figure("start to the usage line", statistics.median(usage)))
        steps = []
        with tempfile.TemporaryDirectory() as folder:
            for number in range(repeats):
                steps.append(until(client, tag, tiny_job(Path(folder) / str(number)), ["train"], "step=1/"))
            found.append(figure("start to the first step", statistics.median(steps)))
            # the line in which it says that it answers comes when the model has answered once
            answers = [
                until(client, server, tiny_tree(Path(folder) / f"served-{number}"), ["serve"], "answering at") for number in range(repeats)
            ]
            found.append(figure("start to the first answer", statistics.median(answers)))
    return found


def until(client: DockerClient, tag: str, root: Path | None, command: list[str], sign: str) -> float:
    """Seconds from asking for a container to the line in which `sign` stands."""
    volumes = [] if root is None else [f"{root}:/opt/ml"]
    environment = {SERVE_VARIABLE: ServeSpec(open=True).to_text()}
    began = time.monotonic()
    started = client.containers.run(
        tag,
        command,
        detach=True,
        read_only=True,
        tmpfs={"/tmp": "mode=1777"},
        network_mode="none",
        user=f"{os.getuid()}:{os.getgid()}",
        cap_drop=["ALL"],
        volumes=volumes,
        environment=environment,
    )
    try:
        said = ""
        for piece in started.logs(stream=True, follow=True):
            said += piece.decode(errors="replace")
            if sign in said:
                return time.monotonic() - began
        raise SystemExit(f"the container ended without {sign!r}; it said:\n{said}")
    finally:
        started.remove(force=True, v=True)


def tiny_job(root: Path) -> Path:
    from support.job_tree import make_job
    from support.tiny_model import make_tiny_model

    model = make_tiny_model(root / "made")
    job = make_job(root / "job", model, max_steps=2)
    job.channel("model").unlink()
    shutil.move(model, job.channel("model"))
    prepare = [sys.executable, "-P", "-m", "trimtab_runtime", "prepare"]
    subprocess.run(prepare, env={**os.environ, "TRIMTAB_ROOT": str(job.root)}, stdout=subprocess.DEVNULL, check=True)
    return job.root


def tiny_tree(root: Path) -> Path:
    from support.tiny_model import make_tiny_model

    make_tiny_model(root / "model")
    return root


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="end with 1 when a measured figure passes its ceiling")
    parser.add_argument("--cold", action="store_true", help="measure the build from nothing, too: without the engine's cache, some minutes")
    parser.add_argument("--base", help="base image of the build")
    parser.add_argument("--repeats", type=int, default=3, help="starts of which the median is taken  [default: 3]")
    parser.add_argument("--json", action="store_true", help="print one JSON value instead of lines")
    asked = parser.parse_args()
    try:
        found = measure(base=asked.base, cold=asked.cold, repeats=asked.repeats)
    except TrimtabError as exc:
        print(f"images: {exc}", file=sys.stderr)
        return 1
    print(
        json.dumps([{**asdict(one), "kept": one.kept} for one in found], indent=1) if asked.json else "\n".join(one.line() for one in found)
    )
    # also beside JSON: what was not measured was not kept either
    for line in not_measured(found):
        print(line, file=sys.stderr if asked.json else sys.stdout)
    return int(asked.check and not all(one.kept for one in found))


if __name__ == "__main__":
    sys.exit(main())
