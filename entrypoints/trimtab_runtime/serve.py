"""Serve a model over HTTP until told to end: the process around the application in `app`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path

import uvicorn

from trimtab.errors import EndpointError, TrimtabError, WeightsError
from trimtab.layout import JobDir
from trimtab_runtime.app import build
from trimtab_runtime.engine import Engine
from trimtab_runtime.manifest import write_json

HOST_VARIABLE, PORT_VARIABLE, PIPE_VARIABLE = "TRIMTAB_HOST", "TRIMTAB_PORT", "TRIMTAB_UNTIL_STDIN_CLOSES"
DRAIN = 100  # seconds that running requests get after SIGTERM; platforms kill after 120
CONTAINER = Path("/opt/ml")


def serve(job: JobDir) -> int:
    """Serve the base model in the channel `model`, and the artifact in the model folder where there is one, until SIGTERM.

    In a container (the tree is `/opt/ml`) on 0.0.0.0:8080, elsewhere on 127.0.0.1 and any free port; `TRIMTAB_HOST` and
    `TRIMTAB_PORT` decide otherwise. `output/data/endpoint.json` says where ({"url", "pid"}) once the model has answered.
    With `TRIMTAB_UNTIL_STDIN_CLOSES` it also ends with the process that holds the other end of its standard input.
    Returns the exit code.
    """
    signal.signal(signal.SIGTERM, _exit)  # while loading; the first process of a container has no default for it
    if os.environ.get(PIPE_VARIABLE):
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    record = job.events.parent / "endpoint.json"
    try:
        engine, alias = _load(job)
        with _listen(job) as listener:
            host, port = listener.getsockname()[:2]
            server = uvicorn.Server(
                uvicorn.Config(build(engine, alias), log_level="warning", access_log=False, timeout_graceful_shutdown=DRAIN, lifespan="on")
            )
            record.parent.mkdir(parents=True, exist_ok=True)
            url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
            write_json(record, {"url": url, "pid": os.getpid()})
            print(f"answering at {url} as {', '.join(engine.names)}", flush=True)
            signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn drains, then hands the signal on
            with contextlib.suppress(KeyboardInterrupt):
                server.run(sockets=[listener])
    except (TrimtabError, OSError) as exc:
        print(exc, file=sys.stderr, flush=True)
        return 1
    finally:
        record.unlink(missing_ok=True)
    return 0


def _load(job: JobDir) -> tuple[Engine, str | None]:
    """The engine, having answered once, and the base model's own name where an artifact tells it."""
    base = job.channel("model")
    if not (base / "config.json").is_file():
        raise WeightsError(f"{base} holds no model: put or link the base model's folder there")
    manifest = job.model / "trimtab.json"
    engine = Engine.load(base, job.model if manifest.exists() else None)
    engine.complete([engine.encode("a")], max_new_tokens=1)
    if not manifest.exists():
        return engine, None
    name = json.loads(manifest.read_text(encoding="utf-8")).get("spec", {}).get("model")
    return engine, str(name).rstrip("/").rpartition("/")[2] if name and str(name).startswith(("/", ".", "~")) else name


def _listen(job: JobDir) -> socket.socket:
    inside = job.root == CONTAINER
    host = os.environ.get(HOST_VARIABLE) or ("0.0.0.0" if inside else "127.0.0.1")
    wanted = os.environ.get(PORT_VARIABLE) or ("8080" if inside else "0")
    if not wanted.isdigit() or int(wanted) > 65_535:
        raise EndpointError(f"{PORT_VARIABLE} is {wanted!r}: give a port from 1 to 65535, or 0 for any")
    try:
        return socket.create_server((host, int(wanted)), backlog=128)
    except OSError as exc:
        raise EndpointError(f"cannot listen on {host}:{wanted} ({exc.strerror or exc}): choose another port, or 0 for any") from exc


def _exit(*_: object) -> None:
    raise SystemExit(0)


def _end_with_stdin() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
