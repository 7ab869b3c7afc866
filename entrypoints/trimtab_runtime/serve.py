"""Serve a model over HTTP until told to end: the process around the application in `app` and the engine in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from trimtab.errors import EndpointError, TrimtabError
from trimtab.layout import SERVE_VARIABLE, JobDir
from trimtab.spec import ServeSpec
from trimtab_runtime.app import App
from trimtab_runtime.engines import Facts
from trimtab_runtime.engines.process import EngineProcess
from trimtab_runtime.engines.tree import BASE, MANIFEST, TUNED, Tree, read_json, read_tree
from trimtab_runtime.http import Server
from trimtab_runtime.manifest import write_json
from trimtab_runtime.prompts import Prompts

HOST_VARIABLE, PORT_VARIABLE, PIPE_VARIABLE = "TRIMTAB_HOST", "TRIMTAB_PORT", "TRIMTAB_UNTIL_STDIN_CLOSES"
CONTAINER = Path("/opt/ml")
WITH_CLIENT = 5.0  # seconds that running answers get once the client for which all this was started has gone
_POLL = 0.02


def serve(job: JobDir) -> int:
    """Serve the tree's model, or its base model and adapters, until SIGTERM; then running answers get `grace_seconds`.

    In a container (the tree is `/opt/ml`) on 0.0.0.0:8080, elsewhere on 127.0.0.1 and any free port; `TRIMTAB_HOST` and
    `TRIMTAB_PORT` decide otherwise. The port is open at once and /ping says 503 until the model has answered; from then on
    `output/data/endpoint.json` says where, {"url", "pid", "models", "engine"}. With `TRIMTAB_UNTIL_STDIN_CLOSES` it also ends with the
    process that holds the other end of its standard input. Returns the exit code: 0, or 1 with the cause in `output/failure`.
    """
    with contextlib.suppress(OSError):
        job.failure.unlink(missing_ok=True)
    lines: list[str] = []
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # prompts are encoded by one thread
    try:
        spec = ServeSpec.from_text(os.environ.get(SERVE_VARIABLE) or "{}")
        with _listen(job, spec, key := _key(job)) as listener:
            return asyncio.run(_serve(job, spec, key, listener, lines))
    except TrimtabError as exc:
        _fail(job, str(exc), lines)
        return 1
    except Exception as exc:  # noqa: BLE001  the border: whatever it is, the platform gets the reason and the log where it came from
        say("".join(traceback.format_tb(exc.__traceback__)), file=sys.stderr)
        _fail(job, f"the server has a fault: {type(exc).__name__}: {exc}", lines)
        return 1
    finally:
        with contextlib.suppress(OSError):
            job.endpoint.unlink(missing_ok=True)


async def _serve(job: JobDir, spec: ServeSpec, key: str | None, listener: socket.socket, lines: list[str]) -> int:
    loop = asyncio.get_running_loop()
    end: asyncio.Future[tuple[str, float]] = loop.create_future()  # why, and how many seconds running answers get

    signalled: list[int] = []

    def ask_to_end(why: str, grace: float) -> None:
        if not end.done():
            end.set_result((why, grace))

    def heed(number: int) -> None:
        signalled.append(number)
        if len(signalled) > 1:
            raise SystemExit(0)  # who asks twice does not want to wait
        ask_to_end("the server is ending", spec.grace_seconds)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, heed, number)
    if os.environ.get(PIPE_VARIABLE):
        gone = ("its client has gone", min(spec.grace_seconds, WITH_CLIENT))
        threading.Thread(target=_watch_stdin, args=(lambda: loop.call_soon_threadsafe(ask_to_end, *gone),), daemon=True).start()
    if spec.ttl_minutes is not None:
        loop.call_later(spec.ttl_minutes * 60, ask_to_end, f"its {spec.ttl_minutes:g} minutes are over", spec.grace_seconds)
    tree = read_tree(job, trust_remote_code=spec.trust_remote_code)
    host, port = listener.getsockname()[:2]
    url = f"http://{_host_for(host)}:{port}"
    engine = EngineProcess(spec.max_running, say)
    app = App(engine, Prompts(_folders(tree)), spec, say, key=key, aliases=_aliases(tree, spec))
    server = Server(app.admit, app.answer, say)

    def ready(facts: Facts) -> None:
        for choice in facts.choices:
            say(choice)
        try:
            job.endpoint.parent.mkdir(parents=True, exist_ok=True)
            write_json(job.endpoint, {"url": url, "pid": os.getpid(), "models": list(app.names), "engine": facts.engine})
        except OSError as exc:
            say(f"{job.endpoint} cannot be written ({exc.strerror}); it answers all the same")
        say(f"answering at {url} as {', '.join(app.names)}, by {facts.engine}")

    await server.start(listener)
    running = asyncio.ensure_future(engine.run(ready))
    try:
        stops: list[asyncio.Future[Any]] = [running, end]
        await asyncio.wait(stops, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            lines += engine.last_lines
            running.result()
        why, grace = end.result()
        app.ending, server.closing = f"{why}: ask another one", True
        say(f"{why}; {server.answering} running answers get {grace:g} s")
        until = time.monotonic() + grace
        while server.answering and time.monotonic() < until and not running.done():
            await asyncio.sleep(_POLL)
        engine.break_off(why)
        await asyncio.sleep(_POLL)  # for those who hear it
        return 0
    finally:
        await server.close()
        await engine.close()
        with contextlib.suppress(EndpointError):
            await running
        app.prompts.close()


def _folders(tree: Tree) -> dict[str, Path]:
    """For each name that can be asked, the folder with its tokenizer: an adapter's own, where it has one."""
    own = {name: folder for name, folder in tree.adapters.items() if (folder / "tokenizer.json").is_file()}
    return {name: own.get(name, tree.model) for name in tree.names}


def _aliases(tree: Tree, spec: ServeSpec) -> dict[str, str]:
    """More names: the base model's own, where the artifact tells it, and the one that was asked for."""
    aliases: dict[str, str] = {}
    if TUNED in tree.adapters:
        name = str(read_json(tree.adapters[TUNED] / MANIFEST).get("spec", {}).get("model") or "")
        aliases[name.rstrip("/").rpartition("/")[2] if name.startswith(("/", ".", "~")) else name] = BASE
    if spec.name:
        aliases.setdefault(spec.name, tree.names[0])
    aliases.pop("", None)
    return aliases


def _key(job: JobDir) -> str | None:
    """The API key. Raises EndpointError for a file that holds none: nobody should take an endpoint for guarded that is not."""
    try:
        key = job.api_key.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as exc:
        raise EndpointError(f"{job.api_key} cannot be read ({type(exc).__name__}): let user {os.geteuid()} read it") from exc
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise EndpointError(f"{job.api_key} holds no key: write one line of letters, digits and signs without blanks")
    return key


def _listen(job: JobDir, spec: ServeSpec, key: str | None) -> socket.socket:
    inside = job.root == CONTAINER
    host = os.environ.get(HOST_VARIABLE) or ("0.0.0.0" if inside else "127.0.0.1")
    wanted = os.environ.get(PORT_VARIABLE) or ("8080" if inside else "0")
    if not re.fullmatch("[0-9]{1,5}", wanted) or int(wanted) > 65_535:
        raise EndpointError(f"{PORT_VARIABLE} is {wanted!r}: give a port from 1 to 65535, or 0 for any")
    if key is None and not spec.open and not _is_loopback(host):
        raise EndpointError(
            f"others reach {host} and there is no API key: write one to {job.api_key}, set {HOST_VARIABLE}=127.0.0.1, "
            f"or, where a platform in front checks who asks, set {SERVE_VARIABLE}='{{\"open\": true}}'"
        )
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, int(wanted)), family=family, backlog=256)
    except OSError as exc:
        raise EndpointError(f"cannot listen on {host}:{wanted} ({exc.strerror or exc}): choose another port, or 0 for any") from exc


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _host_for(host: str) -> str:
    """The address by which this machine reaches what listens on `host`."""
    there = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{there}]" if ":" in there else there


def _watch_stdin(gone: Callable[[], object]) -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    with contextlib.suppress(RuntimeError):  # the loop has ended already
        gone()


def _fail(job: JobDir, cause: str, lines: list[str]) -> None:
    """The cause first, then the engine's last lines, in the failure file; the cause in the log."""
    say(cause, file=sys.stderr)
    try:
        job.failure.parent.mkdir(parents=True, exist_ok=True)
        job.failure.write_text("\n".join([cause, *(["", "the engine's last lines:", *lines] if lines else [])]) + "\n", encoding="utf-8")
    except OSError as exc:
        say(f"the failure file cannot be written: {exc}", file=sys.stderr)


def say(line: str, file: TextIO | None = None) -> None:
    """A line of the log. A log that cannot be written, as on a full disk, ends nothing: not now, and not when what is left is flushed."""
    with contextlib.suppress(OSError):
        os.write((file or sys.stdout).fileno(), f"{line}\n".encode(errors="replace"))
