"""The main job on this machine: pages on a loopback web server -> Job.fit() -> base and tuned model side by side.

    python benchmarks/demo.py [--pages FOLDER] [--probes FILE] [--out FOLDER]

Leaves answers.json, from which its last line is computed. Interrupted, it goes on from the newest checkpoint when it
is started again with the same pages.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from trimtab import Job, Run, RunFailed, TrimtabError, probes
from trimtab.backends.base import RunState
from trimtab.errors import RunNotFound, SpecError
from trimtab.evaluation import Prompt, evaluate
from trimtab.events import Event, Phase, Step, read
from trimtab.layout import JobDir
from trimtab.probes import KINDS, WORDS, Probes, is_right, plain_words
from trimtab.progress import display
from trimtab_runtime.tokenizer import Tokenizer

HERE = Path(__file__).parent / "demo"
SUFFIXES = {".html": "text/html", ".htm": "text/html", ".txt": "text/plain", ".md": "text/markdown"}
NEW_TOKENS = {"starts": 40, "questions": 64, "general": 64}
SHOWN = {"starts": 10, "questions": 16, "general": 5}


def main() -> int:
    parser = argparse.ArgumentParser(description="Tune the default model on a folder of pages and compare it with what it was.")
    parser.add_argument("--pages", type=Path, default=HERE / "pages", help="folder of .html, .txt or .md pages")
    parser.add_argument("--probes", type=Path, default=HERE / "probes.json", help="JSON file of starts, questions and general questions")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder for the run and answers.json")
    options = parser.parse_args()
    try:
        demo(options.pages, options.probes, options.out)
    except TrimtabError as exc:
        print(f"demo: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; what was done is kept: run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def demo(pages: Path, probe_file: Path, out: Path) -> None:
    began = time.monotonic()
    asked = probes.load(probe_file, default={"general": probes.load(HERE / "probes.json")["general"]})
    out.mkdir(parents=True, exist_ok=True)
    os.environ["TRIMTAB_HOME"] = str(out.absolute() / "home")
    with serving(pages) as urls:
        print(f"demo: {len(urls)} pages on {urls[0].rsplit('/', 1)[0]}", flush=True)
        job = Job(model="smollm2-135m-instruct", data=urls, method="qlora", allow_private_hosts=True)
        run = finished(job, pages, out / "state.json")

    with display() as screen:
        screen.say(f"asking {sum(map(len, asked.values()))} probes of the base and of the tuned model")
        prompts = [
            Prompt(f"{kind}/{number}", "complete" if kind == "starts" else "chat", probe.prompt, NEW_TOKENS[kind])
            for kind in KINDS
            for number, probe in enumerate(asked[kind])
        ]
        told = evaluate(run.artifact(), prompts, {"unrelated": (HERE / "unrelated.txt").read_text(encoding="utf-8")}, show=screen.show)
    result = judged(asked, told, training_text(run))
    result["seconds"] = round(time.monotonic() - began)
    result["handle"] = str(run.handle)
    result["training"] = pace(read(JobDir(run.artifact().path.parent).events))
    (out / "answers.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    show(result)
    with run.deploy() as endpoint:
        for entry in [*result["questions"], *result["general"]][:1]:  # the first, right or wrong
            print(f"\nasked at {endpoint.url}: {entry['prompt']}\n  tuned: {endpoint.chat(entry['prompt'])}")
    (out / "state.json").unlink(missing_ok=True)
    print(
        f"\ntraining: first step {result['training']['first_step_after']:.1f} s after its process began, "
        f"then {result['training']['tokens_per_second']:.0f} tokens/s (median)"
    )
    print(f"answers: {out / 'answers.json'}   artifact: {run.artifact().path}")
    print(last_line(result), flush=True)


def finished(job: Job, pages: Path, state: Path) -> Run:
    """The run of this job on these pages, done: an interrupted one goes on, else a new one starts."""
    key = hashlib.sha256(job.spec.train.digest().encode() + b"".join(path.read_bytes() for path in page_files(pages))).hexdigest()
    run = None
    try:
        found = json.loads(state.read_text(encoding="utf-8"))
        earlier = Run.attach(found["handle"])
        if found["key"] == key:
            run = earlier
        elif not earlier.status().done:
            earlier.stop()
    except (OSError, ValueError, KeyError, RunNotFound):
        pass
    if run is None:
        print("demo: preparing the data takes a minute or two and is kept once it is done", flush=True)
        run = job.fit(wait=False)
        state.write_text(json.dumps({"key": key, "handle": str(run.handle)}), encoding="utf-8")
    elif run.status().state in (RunState.STOPPED, RunState.FAILED):
        print(f"demo: {run.handle} was interrupted; it goes on from its newest checkpoint", flush=True)
        run.resume()
    try:
        with display() as screen:
            run.wait(progress=screen)
    except KeyboardInterrupt:
        print("\ndemo: stopping the run after a checkpoint ...", file=sys.stderr, flush=True)
        run.stop()
        raise
    except RunFailed:
        state.unlink(missing_ok=True)
        raise
    if run.status().state is RunState.STOPPED:
        raise TrimtabError(f"{run.handle} was stopped from elsewhere; run the same command again to go on from its checkpoint")
    return run


def judged(asked: Probes, told: dict[str, Any], trained_on: str) -> dict[str, Any]:
    """Every probe with both answers and whether each is right; those that stand in the training text do not count."""
    result: dict[str, Any] = {"excluded": []}
    for kind in KINDS:
        result[kind] = []
        for number, probe in enumerate(asked[kind]):
            if kind != "starts" and " " + " ".join(plain_words(probe.prompt)) + " " in trained_on:
                result["excluded"].append({"kind": kind, "prompt": probe.prompt})
                continue
            entry: dict[str, Any] = {"prompt": probe.prompt, "accept": list(probe.accept)}
            for name in ("base", "tuned"):
                answer = told[name]["answers"][f"{kind}/{number}"]
                right = is_right(answer["text"], probe.accept, words=WORDS[kind])
                # a chat that does not end by itself is no chat any more
                entry |= {
                    name: answer["text"],
                    f"{name}_right": right and (answer["ended"] or kind != "general"),
                    f"{name}_ended": answer["ended"],
                }
            result[kind].append(entry)
    result["perplexity"] = {name: told[name]["perplexity"]["unrelated"] for name in ("base", "tuned")}
    return result


def training_text(run: Run) -> str:
    """The words of everything the run was trained on, to show that no probe question is among it."""
    job = JobDir(run.artifact().path.parent)
    tokens = np.load(job.channel("train") / "tokens.npy").tolist()
    return " " + " ".join(plain_words(Tokenizer(job.channel("model")).decode(tokens))) + " "


def pace(events: Iterable[Event]) -> dict[str, float]:
    """Seconds from the start of the training process (the last one, of a resumed run) to its first step; median tokens/s of all steps."""
    at, speeds = {}, []
    for event in events:
        if isinstance(event, Phase):
            at[event.name] = event.at
        elif isinstance(event, Step):
            speeds.append(event.tokens_per_second)
    return {"first_step_after": at["train"] - at["start"], "tokens_per_second": statistics.median(speeds)}


def last_line(result: dict[str, Any]) -> str:
    def score(kind: str, name: str) -> str:
        return f"{sum(entry[f'{name}_right'] for entry in result[kind])}/{len(result[kind])}"

    parts = [f"{name} {score('starts', name)} starts {score('questions', name)} questions" for name in ("base", "tuned")]
    before, after = result["perplexity"]["base"], result["perplexity"]["tuned"]
    return (
        f"demo: {', '.join(parts)}, general {score('general', 'base')} -> {score('general', 'tuned')}, "
        f"perplexity {before:.1f} -> {after:.1f}, {result['seconds']} s"
    )


def show(result: dict[str, Any]) -> None:
    table = Table(title="the same prompts, before and after", show_lines=True)
    for title, ratio in (("asked", 2), ("base model", 3), ("tuned model", 3)):
        table.add_column(title, ratio=ratio, overflow="fold")
    for kind, count in SHOWN.items():
        entries = result[kind]
        for number in range(min(count, len(entries))):
            entry = entries[number * len(entries) // min(count, len(entries))]
            table.add_row(entry["prompt"], *(_cell(entry, name) for name in ("base", "tuned")))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for left_out in result["excluded"]:
        console.print(f"not counted, since it stands in the training text: {left_out['prompt']}")


def _cell(entry: dict[str, Any], name: str) -> str:
    text = " ".join(entry[name].split())
    text = text if len(text) <= 220 else text[:217] + "..."
    return f"{'[green]right[/]' if entry[f'{name}_right'] else '[red]wrong[/]'}  " + text.replace("[", "\\[")


def page_files(pages: Path) -> list[Path]:
    found = sorted(path for path in pages.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()) if pages.is_dir() else []
    if not found:
        raise SpecError(f"{pages} holds no pages: give a folder with .html, .txt or .md files, as in  make demo PAGES=folder")
    return found


@contextmanager
def serving(pages: Path) -> Iterator[list[str]]:
    """The folder's pages as URLs of a web server on loopback."""
    files = page_files(pages)

    class Quiet(SimpleHTTPRequestHandler):
        extensions_map = SUFFIXES

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(pages)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        from urllib.parse import quote

        yield [f"http://127.0.0.1:{server.server_port}/{quote(path.relative_to(pages).as_posix())}" for path in files]
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    sys.exit(main())
