"""The one command that proves the GPU image where there is a GPU: its self-test, on the first card, in a container without a network."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trimtab import images
from trimtab.backends.container import GPU_REMEDY
from trimtab.doctor.facts import Facts
from trimtab.doctor.judge import Finding
from trimtab.doctor.look import told
from trimtab.errors import BackendUnavailable

if TYPE_CHECKING:
    from docker import DockerClient

COMMAND = ("python", "-P", "-m", "trimtab_runtime.selftest", "--gpu")
LABEL = "trimtab.doctor"
NOTHING_RAN = "nothing ran on a GPU"

_PATIENCE = 600.0  # seconds; the first start on a card compiles kernels
_FULL_LOG = 12  # lines of a container that said nothing we know


def prove(facts: Facts) -> list[Finding]:
    """Run the self-test of the GPU image on a GPU; a finding for each of its checks, or one that says why nothing ran.

    The engine is asked in any case: it may be on another machine, whose driver is not seen from here.
    """
    try:
        with contextlib.closing(images.engine(timeout=_PATIENCE)) as client:
            image = images.find("gpu", client=client)
            code, log = run(client, image.tag)
    except BackendUnavailable as exc:
        why, remedy = told(exc)
        seen = "" if facts.gpu.driver else "; this machine shows no NVIDIA driver either"
        return [Finding("gpu test", "missing", f"{NOTHING_RAN}: {why}{seen}", remedy, ("docker",))]
    return read(code, log)


def read(code: int, log: Sequence[str]) -> list[Finding]:
    """Findings from the self-test's exit code and lines. Only checks that name the device cuda ran on a GPU."""
    said = [facts for line in log if (facts := _facts(line)) is not None]
    ran = [facts for facts in said if facts["device"] == "cuda"]
    remedy = "run it again with  trimtab doctor --gpu , and see what the driver says with  nvidia-smi"
    findings = [
        Finding(f"gpu {facts['check']}", "ok" if facts["ok"] else "missing", facts["found"], "" if facts["ok"] else remedy, ("docker",))
        for facts in said
    ]
    if not ran:
        why = findings[0].found if findings else "its last lines were: " + " | ".join(log[-_FULL_LOG:])
        return [Finding("gpu test", "missing", f"{NOTHING_RAN}: {why}", GPU_REMEDY, ("docker",))]
    if code != 0 and all(facts["ok"] for facts in said):
        last = " | ".join(log[-_FULL_LOG:])
        findings.append(Finding("gpu test", "missing", f"it ended with exit code {code} before its end: {last}", remedy, ("docker",)))
    return findings


def run(client: DockerClient, tag: str) -> tuple[int, list[str]]:
    """The exit code and lines of the self-test. Raises BackendUnavailable when the engine gives the container no GPU."""
    import docker.errors
    from docker.types import DeviceRequest

    try:
        container = client.containers.create(
            tag,
            entrypoint=list(COMMAND),
            command=[],
            device_requests=[DeviceRequest(count=1, capabilities=[["gpu"]])],
            network_mode="none",
            read_only=True,
            tmpfs={"/tmp": ""},
            cap_drop=["ALL"],
            security_opt=["no-new-privileges"],
            use_config_proxy=False,  # the proxies of docker's own configuration may have passwords in them
            labels={LABEL: "gpu"},
        )
        try:
            container.start()
            code = int(container.wait(timeout=_PATIENCE)["StatusCode"])
            return code, container.logs().decode(errors="replace").splitlines()
        finally:
            container.remove(force=True)
    except docker.errors.APIError as exc:
        raise BackendUnavailable(f"the engine gives containers no GPU ({exc.explanation or exc}):  {GPU_REMEDY}") from exc
    except OSError as exc:
        late = f"the self-test did not end within {_PATIENCE:g} s ({exc})"
        raise BackendUnavailable(f"{late}:  look for what holds the card with  nvidia-smi") from exc


def _facts(line: str) -> dict[str, str] | None:
    with contextlib.suppress(ValueError):
        value = json.loads(line)
        if isinstance(value, dict) and {"check", "ok", "found", "device"} <= set(value):
            return value
    return None
