"""A folder of wheels for an image's build: found in pip's own configuration, and served to the build on loopback."""

from __future__ import annotations

import ast
import contextlib
import functools
import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from trimtab.errors import BackendError

# The address is part of what the engine's build cache goes by, so it is the same each time, unless another build has it.
_PORT = 47_113


def configured(pattern: str) -> Path | None:
    """The folder of pip's find-links (`PIP_FIND_LINKS`, or its configuration file) in which a file fits a pattern, such as torch-*.whl."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False).stdout
    pairs = [line.partition("=") for line in listed.splitlines()]
    said = [ast.literal_eval(value) for name, _, value in pairs if name in {":env:.find-links", "global.find-links", "install.find-links"}]
    folders = [Path(word.removeprefix("file://")) for text in said for word in text.split()]
    return next((folder for folder in folders if folder.is_dir() and any(folder.glob(pattern))), None)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder's address on 127.0.0.1 while the context lasts. Raises BackendError where there is no such folder."""
    if not folder.is_dir():
        raise BackendError(f"there is no folder {folder}: give --find-links a folder of wheels")
    answer = functools.partial(_Quiet, directory=str(folder))
    try:
        server = _Server(("127.0.0.1", _PORT), answer)
    except OSError:
        server = _Server(("127.0.0.1", 0), answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(http.server.ThreadingHTTPServer):
    """Waits, when it is closed, for the answers that it is giving."""

    daemon_threads = False


class _Quiet(http.server.SimpleHTTPRequestHandler):
    """Says nothing of what it serves; gives up on a client that is silent for a minute."""

    timeout = 60

    def log_message(self, format: str, *arguments: object) -> None:
        pass
