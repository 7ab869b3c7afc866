"""A server of a few lines in the place of the runtime's, for what that never does; it keeps to the container contract."""

from __future__ import annotations

import sys
from pathlib import Path

_SERVER = """\
import http.server, json, os, pathlib, signal, sys, threading, time
root = pathlib.Path(os.environ["TRIMTAB_ROOT"])
inside = str(root) == "/opt/ml"
key = root / "input/config/api_key"
wanted = f"Bearer {key.read_text()}" if key.exists() else None
failure, record = root / "output/failure", root / "output/data/endpoint.json"

class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send(200, {"data": [{"id": "script"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if wanted and self.headers.get("Authorization") != wanted:
            return self.send(401, {"error": {"message": "wrong key"}})
        self.asked(body)

    def asked(self, body):
        self.send(200, {"choices": [{"text": body["prompt"][::-1]}]})

    def send(self, status, value, **headers):
        text = json.dumps(value).encode()
        self.send_response(status)
        for name, given in {"Content-Length": str(len(text)), **headers}.items():
            self.send_header(name.replace("_", "-"), given)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass

def end(code):
    record.unlink(missing_ok=True)
    os._exit(code)

def watch():
    while os.read(0, 4096):
        pass
    end(0)

signal.signal(signal.SIGTERM, lambda *_: end(0))
if os.environ.get("TRIMTAB_UNTIL_STDIN_CLOSES"):
    threading.Thread(target=watch, daemon=True).start()
print("script server", flush=True)
#LINES
host = os.environ.get("TRIMTAB_HOST") or ("0.0.0.0" if inside else "127.0.0.1")
server = http.server.ThreadingHTTPServer((host, int(os.environ.get("TRIMTAB_PORT") or (8080 if inside else 0))), Answers)
server.daemon_threads = True
told = {"url": f"http://127.0.0.1:{server.server_port}", "pid": os.getpid(), "models": ["script"], "engine": "script"}
record.with_suffix(".new").write_text(json.dumps(told))
record.with_suffix(".new").replace(record)
server.serve_forever()
"""


def program(*lines: str) -> str:
    """The server's text; `lines` are done before it listens, and may change `Answers`."""
    return _SERVER.replace("#LINES", "\n".join(lines))


def script_server(folder: Path, *lines: str) -> str:
    """An executable to be given as `python` of the process deployer."""
    path = folder / "script-server"
    path.write_text(f"#!{sys.executable}\n{program(*lines)}")
    path.chmod(0o755)
    return str(path)
