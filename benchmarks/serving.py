"""What our server takes from the engine behind it:  python benchmarks/serving.py --check

The same questions go to our server (`python -m trimtab_runtime serve`, loopback HTTP, streamed) and to the bare engine: the same Engine
in a process of its own, with no text, no pipe and no HTTP, which is given the same prompts as token ids and stepped until all are
answered. A burst is 1, 8 or 32 clients asking at once. Bursts go to one and the other in turns, the first one changing, with prompts
that neither has seen: about 130 tokens, 64 new ones, greedy. The ratio is the median, over pairs of bursts, of (server's tokens a second /
engine's); the figure is the smallest of the three. What reading the answers costs is on the server's side, on the same two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trimtab import weights
from trimtab.errors import TrimtabError
from trimtab.layout import ROOT_VARIABLE, SERVE_VARIABLE, JobDir
from trimtab.spec import ServeSpec

HERE = Path(__file__).resolve().parent
BAR = 0.97
PAIRS = {1: 14, 8: 10, 32: 8}  # clients, and how many pairs of bursts

BARE = """
import json, os, sys, time
from trimtab.layout import SERVE_VARIABLE, JobDir
from trimtab.spec import ServeSpec
from trimtab_runtime.engines import Request
from trimtab_runtime.engines.choose import load
from trimtab_runtime.tokenizer import Tokenizer
job = JobDir.from_environment()
out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
engine, tokenizer, number = load(job, ServeSpec.from_text(os.environ[SERVE_VARIABLE])), Tokenizer(job.model), 0
print(engine.facts.engine, file=out, flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    prompts = [tokenizer.text(prompt) for prompt in asked["prompts"]]
    first, counts, running = {}, {}, set()
    def emit(id, ids, reason):
        if ids:
            first.setdefault(id, time.perf_counter())
            counts[id] = counts.get(id, 0) + len(ids)
        if reason:
            running.discard(id)
    began, cpu = time.perf_counter(), time.process_time()
    for ids in prompts:
        number += 1
        running.add(number)
        engine.add(Request(id=number, ids=ids, model=engine.facts.names[0], max_new_tokens=asked["limit"]))
    while running:
        engine.step(emit)
    took = time.perf_counter() - began
    print(json.dumps({"tokens": sum(counts.values()), "seconds": took, "firsts": [at - began for at in first.values()],
                      "engine": time.process_time() - cpu}), file=out, flush=True)
"""


@dataclass(frozen=True)
class Burst:
    """New tokens of all answers, seconds until the last of them, median seconds to a first token, and seconds of a core: of the engine's
    process, of the server's before it, and of ours that reads the answers (0 where there is none)."""

    tokens: int
    seconds: float
    first: float
    engine: float
    front: float = 0.0
    reading: float = 0.0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Row:
    """Medians of one number of clients, and of its pairs the ratio's quartiles: (25 %, 50 %, 75 %). Milliseconds of a core for a token:
    `reading` of the clients, `front` of the server's own process, `engine` of the engine behind it, `alone` of the bare engine."""

    clients: int
    served: float
    bare: float
    served_first: float
    bare_first: float
    ratio: tuple[float, float, float]
    reading: float
    front: float
    engine: float
    alone: float

    def line(self) -> str:
        low, middle, high = self.ratio
        return (
            f"{self.clients:>7}  {self.served:>6.1f} {self.bare:>6.1f}  {self.served_first * 1e3:>6.0f} {self.bare_first * 1e3:>6.0f}"
            f"  {middle:>6.3f}  {low:.3f}-{high:.3f}  {self.reading:>7.3f} {self.front:>6.3f} {self.engine:>6.2f} {self.alone:>6.2f}"
        )


class Bare:
    """The engine alone, in a process that ends with us."""

    def __init__(self, environment: dict[str, str]) -> None:
        command = [sys.executable, "-P", "-c", BARE]
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.engine = self._line()

    def burst(self, prompts: list[str], limit: int) -> Burst:
        assert self._process.stdin is not None
        print(json.dumps({"prompts": prompts, "limit": limit}), file=self._process.stdin, flush=True)
        said = json.loads(self._line())
        return Burst(said["tokens"], said["seconds"], statistics.median(said["firsts"]), said["engine"])

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("serving: the bare engine ended; its own lines are above")
        return line.strip()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


class Served:
    """Our server, which ends when we do: it holds the other end of a pipe of ours."""

    def __init__(self, environment: dict[str, str], job: JobDir) -> None:
        command = [sys.executable, "-P", "-m", "trimtab_runtime", "serve"]
        environment = {**environment, "TRIMTAB_UNTIL_STDIN_CLOSES": "1"}
        log = job.root / "log.txt"
        with log.open("w") as file:
            self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=file, stderr=file)
        while not job.endpoint.exists():
            if self._process.poll() is not None:
                raise SystemExit(f"serving: the server ended: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        said = json.loads(job.endpoint.read_text(encoding="utf-8"))
        self.engine, self._port = said["engine"], int(said["url"].rpartition(":")[2])

    def burst(self, prompts: list[str], limit: int) -> Burst:
        bodies = [
            json.dumps(
                {"prompt": prompt, "max_tokens": limit, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
            ).encode()
            for prompt in prompts
        ]
        before, reading, began = self._cores(), time.process_time(), time.perf_counter()
        answers = ask(self._port, bodies)
        reading = time.process_time() - reading
        front, engine = (after - then for after, then in zip(self._cores(), before, strict=True))
        return Burst(
            tokens=sum(answer.tokens() for answer in answers),
            seconds=max(answer.end for answer in answers) - began,
            first=statistics.median(answer.first for answer in answers) - began,
            engine=engine,
            front=front,
            reading=reading,
        )

    def _cores(self) -> tuple[float, float]:
        """Seconds of a core that the server's process has taken, and its engine's."""
        front = self._process.pid
        engine = Path(f"/proc/{front}/task/{front}/children").read_text().split()[0]
        stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13] for pid in (front, engine)]
        tick = os.sysconf("SC_CLK_TCK")
        return sum(map(int, stats[0])) / tick, sum(map(int, stats[1])) / tick

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


class _Answer:
    """One answer on its connection. It is looked into only when all is over: reading it is to cost the server's side next to nothing."""

    def __init__(self, port: int, body: bytes) -> None:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self._connection = socket.create_connection(("127.0.0.1", port), 600)
        self._connection.sendall(f"{head}Connection: close\r\n\r\n".encode() + body)
        self._pieces: list[bytes] = []
        self.first = self.end = 0.0

    def fileno(self) -> int:
        return self._connection.fileno()

    def read(self) -> bool:
        """What has come; false when it was the end."""
        data = self._connection.recv(1 << 16)
        if not data:
            self.end = time.perf_counter()
            self._connection.close()
            return False
        if not self.first and b"data:" in data:
            self.first = time.perf_counter()
        self._pieces.append(data)
        return True

    def tokens(self) -> int:
        """How many new ones there were, as the last event but [DONE] tells."""
        whole = b"".join(self._pieces)
        events = [json.loads(line[5:]) for line in whole.splitlines() if line.startswith(b"data:") and b"[DONE]" not in line]
        used: list[dict[str, Any]] = [event["usage"] for event in events if event.get("usage")]
        if b" 200 " not in whole[:20] or not used:
            raise SystemExit(f"serving: the server's answer is none: {whole[:500].decode(errors='replace')}")
        return int(used[-1]["completion_tokens"])


def ask(port: int, bodies: list[bytes]) -> list[_Answer]:
    """All of them at once."""
    answers = [_Answer(port, body) for body in bodies]
    open_ones = {answer.fileno(): answer for answer in answers}
    with select.epoll() as poll:
        for number in open_ones:
            poll.register(number, select.EPOLLIN)
        while open_ones:
            for number, _ in poll.poll():
                if not open_ones[number].read():
                    del open_ones[number]
    return answers


def prompts(count: int) -> Iterator[str]:
    """Beginnings of about 130 tokens, each different from its first word on, so that nothing that was computed for another is of use."""
    words = (HERE / "demo" / "unrelated.txt").read_text(encoding="utf-8").split()
    draw = random.Random(0)
    for number in range(count):
        at = draw.randrange(len(words) - 110)
        yield " ".join([f"{number}:", *words[at : at + 108]])


@contextlib.contextmanager
def both(folder: Path, spec: ServeSpec) -> Iterator[tuple[Served, Bare]]:
    """Server and engine, each with a tree of its own in which the model lies, ended at the end."""
    with tempfile.TemporaryDirectory() as work, contextlib.ExitStack() as ends:
        trees = []
        for name in ("served", "bare"):
            job = JobDir(Path(work) / name).make()
            job.model.rmdir()
            job.model.symlink_to(folder)
            trees.append(job)
        given = {name: value for name, value in os.environ.items() if not name.startswith("TRIMTAB_")} | {SERVE_VARIABLE: spec.to_text()}
        served = Served({**given, ROOT_VARIABLE: str(trees[0].root)}, trees[0])
        ends.callback(served.close)
        bare = Bare({**given, ROOT_VARIABLE: str(trees[1].root)})
        ends.callback(bare.close)
        yield served, bare


def measure(served: Served, bare: Bare, pairs: dict[int, int], limit: int) -> dict[int, list[tuple[Burst, Burst]]]:
    """The pairs of bursts, (served, bare), by number of clients."""
    fresh = prompts(sum(clients * (count + 1) for clients, count in pairs.items()))
    found: dict[int, list[tuple[Burst, Burst]]] = {}
    for clients, count in pairs.items():
        for turn in range(-1, count):  # the first is for warming up
            asked = [next(fresh) for _ in range(clients)]
            if turn % 2:
                one, other = served.burst(asked, limit), bare.burst(asked, limit)
            else:
                other, one = bare.burst(asked, limit), served.burst(asked, limit)
            if turn >= 0:
                found.setdefault(clients, []).append((one, other))
                print(f"{clients:>3} clients  {one.rate:6.1f}  {other.rate:6.1f}  {one.rate / other.rate:.3f}", file=sys.stderr)
    return found


def row(clients: int, pairs: list[tuple[Burst, Burst]]) -> Row:
    served, bare = zip(*pairs, strict=True)
    ratios = [one.rate / other.rate for one, other in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    tokens = sum(one.tokens for one in served)
    return Row(
        clients,
        statistics.median(one.rate for one in served),
        statistics.median(one.rate for one in bare),
        statistics.median(one.first for one in served),
        statistics.median(one.first for one in bare),
        (round(low, 4), round(middle, 4), round(high, 4)),
        round(1e3 * sum(one.reading for one in served) / tokens, 4),
        round(1e3 * sum(one.front for one in served) / tokens, 4),
        round(1e3 * sum(one.engine for one in served) / tokens, 4),
        round(1e3 * sum(one.engine for one in bare) / sum(one.tokens for one in bare), 4),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help=f"end with 1 when the figure is below {BAR}")
    parser.add_argument("--json", action="store_true", help="print one JSON value instead of lines")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="alias, Hub id or folder  [default: smollm2-135m-instruct]")
    parser.add_argument("--engine", default="auto", help="auto, openvino, vllm or transformers  [default: auto]")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of an answer at most  [default: 64]")
    parser.add_argument("--clients", type=int, nargs="+", default=list(PAIRS), help="numbers of clients  [default: 1 8 32]")
    parser.add_argument("--pairs", type=int, help="pairs of bursts for each number of clients  [default: 14, 10, 8]")
    asked = parser.parse_args()
    pairs = {clients: asked.pairs or PAIRS.get(clients, 8) for clients in asked.clients}
    try:
        folder = weights.resolve(asked.model, say=lambda line: print(line, file=sys.stderr)).folder
        spec = ServeSpec(engine=asked.engine, max_running=max(pairs), max_waiting=max(pairs))
        with both(folder, spec) as (served, bare):
            engine = bare.engine
            if served.engine != engine:
                raise SystemExit(f"serving: the server has {served.engine} and the bare engine is {engine}: name one with --engine")
            taken = measure(served, bare, pairs, asked.tokens)
    except TrimtabError as exc:
        print(f"serving: {exc}", file=sys.stderr)
        return 1
    rows = [row(clients, bursts) for clients, bursts in taken.items()]
    figure = min(one.ratio[1] for one in rows)
    if asked.json:
        found = {clients: [[asdict(one), asdict(other)] for one, other in bursts] for clients, bursts in taken.items()}
        print(
            json.dumps({"engine": engine, "bursts": found, "rows": [asdict(one) for one in rows], "figure": figure, "bar": BAR}, indent=1)
        )
    else:
        print(
            f"{engine}, {asked.tokens} new tokens an answer\n         tokens/s       first token, ms                      core ms a token"
        )
        print("clients  server engine  server engine   ratio  quartiles    reading  front engine  alone")
        print("\n".join(one.line() for one in rows))
        print(f"our server against the bare engine {figure:.3f}  bar {BAR}  {'kept' if figure >= BAR else 'MISSED'}")
    return int(asked.check and figure < BAR)


if __name__ == "__main__":
    sys.exit(main())
