"""Memory and step time as estimated, beside what runs take:  python benchmarks/estimate.py --check

Eight cases of (model, method, tokens in a row): a random Llama of two million parameters, SmolLM2-135M, and a random one with four of
TinyLlama-1.1B's layers (300 million). Each is a real run in a process of its own, three passes over its rows, made from the demo's
pages with the default views and questions and without replay, which only changes what is in the rows.

Memory is the peak resident set of the run against `peak_memory` of the rows' facts in their manifest. Time is each step after the
first pass (in which oneDNN makes a kernel for each shape that it meets: about 15 ms a row for the tiny model, little for others)
against `step_seconds` of its row, by the rates that `python -m trimtab_runtime measure` found before and after the run; the median of the
ratios counts. Runs and rates use one thread and are timed in seconds of its processor, so that what others do on the machine is no part of
either; where there are no others these are seconds of the clock, too, which are what a user waits for. The bar is judged on the
processor's, because the clock's on a shared machine tell of the others; these are a proxy all the same: others also take caches, and a run
suffers more from that than the rates do. With --threads 0 they use all, timed by the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from trimtab import data, weights
from trimtab.command import inherited, runtime_command, runtime_environment
from trimtab.estimate import ModelFacts, Rates, RowFacts, peak_memory, step_seconds
from trimtab.events import Step, read, read_from
from trimtab.layout import JobDir
from trimtab.spec import TrainSpec

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # for the tiny model

PAGES = Path(__file__).parent / "demo" / "pages"
MEMORY_BAR, TIME_BAR = 0.15, 0.20
ROWS = 5  # about so many in a case
WORDS_A_TOKEN = 0.11  # of the pages, for each token of the rows: a sentence comes in views and answers (default model's tokenizer)
CASES = (
    ("tiny", "lora", 512),
    ("tiny", "qlora", 2048),
    ("smollm2", "lora", 1024),
    ("smollm2", "qlora", 512),
    ("tiny", "full", 512),
    ("smollm2", "full", 512),
    ("wide", "lora", 512),
    ("wide", "qlora", 1024),
)


@dataclass(frozen=True)
class Found:
    """One case: MB and seconds, as measured and as estimated. `seconds` are medians over the steps; `time_ratio` is the paired ratios'."""

    model: str
    method: str
    tokens: int
    dtype: str
    memory: int
    memory_estimated: int
    seconds: float
    seconds_estimated: float
    time_ratio: float
    steps: int

    @property
    def memory_ratio(self) -> float:
        return self.memory / self.memory_estimated

    @property
    def kept(self) -> bool:
        return abs(self.memory_ratio - 1) <= MEMORY_BAR and abs(self.time_ratio - 1) <= TIME_BAR

    def line(self) -> str:
        return (
            f"{self.model:<8} {self.method:<6} {self.tokens:>5}  {self.dtype:<9}"
            f" memory {self.memory:>6,} MB, estimated {self.memory_estimated:>6,} ({self.memory_ratio - 1:+.0%})"
            f"   step {self.seconds:>7.3f} s, estimated {self.seconds_estimated:>7.3f} ({self.time_ratio - 1:+.0%})"
            f"   {'kept' if self.kept else 'MISSED'}"
        )


def models(folder: Path) -> dict[str, Path]:
    """The folders of the three models; the random ones are made there."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from support.tiny_model import make_tiny_model

    tiny, wide = make_tiny_model(folder / "tiny"), make_tiny_model(folder / "wide")
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 4}
    config = LlamaConfig(
        dtype="bfloat16", vocab_size=32_000, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=2, **sizes
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(wide)
    return {"tiny": tiny, "wide": wide, "smollm2": weights.resolve("smollm2-135m-instruct", say=lambda line: None).folder}


def make_job(root: Path, model: Path, spec: TrainSpec, *, small_vocabulary: bool) -> JobDir:
    """The tree that a run starts from, with so many of the pages' words that they make some rows."""
    job = JobDir(root).make()
    job.hyperparameters.write_text(json.dumps(spec.to_hyperparameters()), encoding="utf-8")
    job.channel("documents").mkdir()
    budget = round(ROWS * spec.max_seq_len * WORDS_A_TOKEN * (0.4 if small_vocabulary else 1))
    lines = []
    for document in data.load((str(PAGES),), say=lambda line: None).documents:
        words = document.text.split(" ")
        if budget > 0:
            lines.append(json.dumps({"title": document.title, "text": " ".join(words[:budget])}))
        budget -= len(words)
    (job.channel("documents") / "documents.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    job.channel("model").symlink_to(model, target_is_directory=True)
    return job


def run(job: JobDir, verb: str, threads: int) -> list[float]:
    """Runs a verb; seconds of the processor that had passed in its first thread when each step's event was seen."""
    environment = {**inherited(os.environ), **runtime_environment(job.root)} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    seen: list[float] = []
    with (job.root / "log").open("w+") as log:
        child = subprocess.Popen(runtime_command(sys.executable, verb), env=environment, stdout=log, stderr=subprocess.STDOUT)
        place = job.events.stat().st_size if job.events.exists() else 0
        try:
            while child.poll() is None:
                events, place = read_from(job.events, place)
                passed = _processor_seconds(child.pid)
                seen += [passed for event in events if isinstance(event, Step)]
                time.sleep(0.005)
        finally:
            child.kill()
            child.wait()
        if child.returncode:
            log.seek(0)
            raise SystemExit(f"{verb} failed: {job.cause() or log.read()}")
    return seen


def _processor_seconds(pid: int) -> float:
    """What /proc/PID/schedstat counts of a process' first thread (Documentation/scheduler/sched-stats.rst of Linux); 0 at its end."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()[0]) / 1e9
    except (OSError, IndexError):
        return 0.0


def rates(job: JobDir, threads: int) -> Rates:
    run(job, "measure", threads)
    return Rates.model_validate_json(job.rates.read_bytes())


def measure(case: tuple[str, str, int], model: Path, folder: Path, threads: int) -> Found:
    """Rates, run, rates again; and what the estimate says of each step."""
    from trimtab_runtime.recipe import rows_of_step
    from trimtab_runtime.rows import PackedRows, shape_of_row

    name, method, tokens = case
    spec = TrainSpec(model=name, method=method, max_seq_len=tokens, replay=0, epochs=3)
    job = make_job(folder / "-".join(map(str, case)), model, spec, small_vocabulary=name != "smollm2")
    run(job, "prepare", threads)
    before = rates(job, threads)
    seen = run(job, "train", threads)
    after = rates(job, threads)

    facts = ModelFacts.from_config(json.loads((model / "config.json").read_text(encoding="utf-8")))
    manifest = json.loads((job.channel("train") / "manifest.json").read_text(encoding="utf-8"))
    shape = RowFacts.from_manifest(manifest)
    if facts is None or shape is None:
        raise SystemExit("the model does not name its sizes, or the rows' manifest tells nothing of them")
    rows = PackedRows(job.channel("train"))
    steps = [event for event in read(job.events) if isinstance(event, Step)]
    first_pass = rows.ledger.rounds[0]  # steps that meet their row for the first time, for whose shape oneDNN then makes its kernels
    taken, expected = [], []
    for step, began, ended in list(zip(steps[1:], seen, seen[1:], strict=False))[first_pass - 1 :]:
        (row,) = (rows[index] for index in rows_of_step(step.step - 1, rows.ledger.rounds, spec))
        of_step = RowFacts.of([shape_of_row(row.lengths, row.learned)], 0)
        taken.append(ended - began if threads == 1 else len(row.tokens) / step.tokens_per_second)
        expected.append(statistics.mean(step_seconds(spec, facts, found, of_step) for found in (before, after)))
    return Found(
        *case,
        dtype=before.dtype,
        memory=max(step.memory_mb for step in steps),
        memory_estimated=peak_memory(spec, facts, before.dtype, shape).total,
        seconds=round(statistics.median(taken), 4),
        seconds_estimated=round(statistics.median(expected), 4),
        time_ratio=round(statistics.median(one / other for one, other in zip(taken, expected, strict=True)), 4),
        steps=len(steps),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Estimated and measured memory and step time.")
    parser.add_argument("--check", action="store_true", help=f"exit 1 where memory is off by {MEMORY_BAR:.0%} or time by {TIME_BAR:.0%}")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--threads", type=int, default=1, help="threads of runs and rates; 0: all")
    parser.add_argument("--case", action="append", help="only this one, such as smollm2-lora-1024; may be repeated")
    options = parser.parse_args()

    found = []
    with tempfile.TemporaryDirectory() as folder:
        known = models(Path(folder))
        for case in CASES:
            if options.case and "-".join(map(str, case)) not in options.case:
                continue
            found.append(measure(case, known[case[0]], Path(folder), options.threads))
            if not options.json:
                print(found[-1].line(), flush=True)
    if options.json:
        print(json.dumps([asdict(one) for one in found], indent=1))
    memory = max(abs(one.memory_ratio - 1) for one in found)
    seconds = max(abs(one.time_ratio - 1) for one in found)
    kept = all(one.kept for one in found)
    said = f"worst deviation: memory {memory:.1%} (bar {MEMORY_BAR:.0%}), step time {seconds:.1%} (bar {TIME_BAR:.0%})"
    print(f"{said}: {'kept' if kept else 'MISSED'}", file=sys.stderr if options.json else sys.stdout)
    return 0 if kept or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())
