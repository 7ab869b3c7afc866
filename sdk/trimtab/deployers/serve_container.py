"""What an endpoint's container is asked to be, as the Docker Engine takes it (Docker Engine API 1.41, POST /containers/create).

Nothing here asks the engine; files are looked at, to see who may read them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trimtab.backends.container import FOLDER_LABEL, ROOT, USER_LABEL, VERSION_LABEL, Limits, caller
from trimtab.cache import cache_dir
from trimtab.command import TUNING, inherited, runtime_environment
from trimtab.events import Choice
from trimtab.layout import SERVE_VARIABLE, JobDir
from trimtab.serving import Serving

ENDPOINT_LABEL = "trimtab.endpoint"
PORT = "8080/tcp"  # where the server listens inside
NOBODY = 10_001  # whom the server runs as where the caller is root; it needs no name in the image


def user_for(info: Mapping[str, Any], files: Iterable[Path]) -> tuple[str, list[str]]:
    """User and further groups in the container; `info` is the engine's. The caller, and for root a user without a name.

    Where others may not read a file of root's, and it is not trimtab's own, only root may serve it: without any capability.
    """
    user, groups = caller(info)
    if user == "0:0" and os.getuid() == 0 and all(not path.exists() or _open(path) or _own(path) for path in files):
        return f"{NOBODY}:{NOBODY}", []
    return user, groups


def open_to_others(folder: Path) -> None:
    """Let others read what trimtab's cache has of the files that an endpoint's folder links to; the cache's folders stay closed to them."""
    for path in folder.rglob("*"):
        if path.is_symlink() and _own(path.resolve()) and not _open(path):
            path.chmod(path.stat().st_mode | stat.S_IROTH)


def _open(path: Path) -> bool:
    return bool(path.stat().st_mode & stat.S_IROTH)


def _own(path: Path) -> bool:
    return path.is_relative_to(cache_dir().resolve())


def body(
    id: str, image_id: str, folder: Path, serving: Serving, limits: Limits, info: Mapping[str, Any], *, host: str, port: int, detach: bool
) -> dict[str, Any]:
    """The body of the request: no powers, nothing writable but `output`, `scratch` and /tmp, one port on one address.

    What is as large as the model goes to `scratch`, a folder of the endpoint's own on disk: /tmp is memory, and small.
    Not detached it ends when the connection to its standard input does, and the engine removes it.
    """
    user, groups = user_for(info, serving.files.values())
    uid, gid = user.split(":")
    here, inside = JobDir(folder), JobDir(ROOT)
    environment = {**inherited(os.environ, TUNING), **runtime_environment(ROOT, device=serving.device)}
    environment |= {"TMPDIR": str(inside.scratch)}
    environment |= {SERVE_VARIABLE: serving.spec.to_text()} | ({} if detach else {"TRIMTAB_UNTIL_STDIN_CLOSES": "1"})
    mounts = [
        _mount(here.api_key.parent, inside.api_key.parent, read_only=True),
        _mount(here.failure.parent, inside.failure.parent, read_only=False),
        _mount(here.scratch, inside.scratch, read_only=False),
        *(_mount(path, ROOT / name, read_only=True) for name, path in serving.files.items()),
    ]
    compiled = "1g" if serving.device == "gpu" else "64m"  # what vLLM compiles there; OpenVINO leaves it empty
    limited: dict[str, Any] = {
        "Mounts": mounts,
        "NetworkMode": "bridge",
        "PortBindings": {PORT: [{"HostIp": "127.0.0.1" if host == "localhost" else host, "HostPort": str(port or "")}]},
        "ReadonlyRootfs": True,
        # the owner is named, because runc before 1.2 gives a tmpfs the mode that the image's folder has
        "Tmpfs": {
            "/tmp": f"rw,exec,nosuid,nodev,mode=1777,size={compiled}",
            str(ROOT): f"rw,noexec,nosuid,nodev,uid={uid},gid={gid},size=1m",
        },
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges"],
        "GroupAdd": groups,
        "Init": False,  # our own first process reaps and passes signals on
        "AutoRemove": not detach,
        "LogConfig": {"Type": "json-file", "Config": {"max-size": "50m", "max-file": "2"}},
        "ShmSize": 1 << 30,
        **limits.host(),
    }
    if serving.device == "gpu":
        limited["DeviceRequests"] = [{"Driver": "", "Count": -1, "Capabilities": [["gpu"]]}]
    return {
        "Image": image_id,
        "Cmd": ["serve"],
        "User": user,
        "Env": sorted(f"{name}={value}" for name, value in environment.items()),
        "ExposedPorts": {PORT: {}},
        "Labels": {ENDPOINT_LABEL: id, FOLDER_LABEL: str(folder), USER_LABEL: str(os.getuid()), VERSION_LABEL: "1"},
        "HostConfig": limited,
        **({} if detach else {"OpenStdin": True, "StdinOnce": True, "AttachStdin": True}),
    }


def choices(image: str, container: Mapping[str, Any]) -> list[Choice]:
    """What is said aloud when an endpoint starts."""
    found = [Choice(name="image", value=image, reason=container["Image"])]
    if container["User"] == "0:0" and os.getuid() == 0:
        reason = "without any capability, as not all of the model's files may be read by others (chmod a+r)"
        found.append(Choice(name="user", value="root", reason=reason))
    return found


def _mount(source: Path, place: Path, *, read_only: bool) -> dict[str, Any]:
    return {"Type": "bind", "Source": str(source), "Target": str(place), "ReadOnly": read_only}
