"""A job is checked when it is written down; staged by content; and says what it will send before it sends it."""

from __future__ import annotations

import _thread
import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from support.site_server import Reply, SiteServer
from trimtab import DataError, Job, Run, RunFailed, RunNotFound, SpecError, StagingError
from trimtab.backends.base import RunHandle
from trimtab.backends.process import ProcessBackend
from trimtab.events import Phase
from trimtab.ledger import Account, Ledger
from trimtab.plan import plan
from trimtab.spec import TrainSpec
from trimtab.staging import complete, sources_digest, stage

PAGES = Path(__file__).parents[1] / "support" / "pages"
ALIAS = "smollm2-135m-instruct"


def quiet(line: str) -> None:
    pass


def test_options_of_both_specs_are_given_flat():
    job = Job(model=ALIAS, data=[PAGES, "https://example.com/a.html"], lora_rank=8, views=("document",), device="gpu", on_error="skip")
    assert (job.spec.train.lora_rank, job.spec.train.views) == (8, ("document",))
    assert (job.spec.device, job.spec.on_error) == ("gpu", "skip")
    assert job.spec.data == (str(PAGES), "https://example.com/a.html")


def test_one_source_is_enough():
    assert Job(model=ALIAS, data=PAGES).spec.data == (str(PAGES),)
    assert Job(model=ALIAS, data="https://example.com").spec.data == ("https://example.com",)


def test_a_model_folder_may_be_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("m").mkdir()
    assert Job(model=Path("m"), data=PAGES).spec.train.model == str(tmp_path / "m")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora_rang": 8}, "did you mean lora_rank?"),
        ({"devise": "gpu"}, "did you mean device?"),
        ({"model_digest": "0"}, "no option 'model_digest'"),
        ({"backend": "proces"}, "did you mean process?"),
        ({"backend": "kubernetes"}, "there are: process"),
        ({"model": "smolm2-135m"}, f"Did you mean {ALIAS}?"),
        ({"epochs": 0}, r"epochs: .*given: 0"),
        ({"data": []}, "data: "),
    ],
)
def test_what_cannot_run_is_refused_where_it_is_written(options, said):
    with pytest.raises(SpecError, match=said):
        Job(**{"model": ALIAS, "data": PAGES, **options})


@pytest.mark.parametrize(
    "text", ["", "trim-7f3a9c21", "process:/trim-1", "process://../x", "process://a b", "process://-a", "nowhere://trim-1"]
)
def test_a_text_that_is_no_handle_names_no_run(text):
    with pytest.raises(RunNotFound):
        Run.attach(text)


def test_a_handle_is_text_both_ways():
    handle = RunHandle("process", "trim-7f3a9c21")
    assert str(handle) == "process://trim-7f3a9c21"
    assert RunHandle.parse(str(handle)) == handle
    with pytest.raises(RunNotFound, match=r"did you mean process://trim-7f3a9c21\?"):
        RunHandle.parse("trim-7f3a9c21")


def test_a_plan_counts_steps_as_the_runtime_does():
    ledger = Ledger(accounts={"document": Account(samples=9, tokens=900, trained=900)}, rounds=(10,), row_tokens=100)
    spec = TrainSpec(model=ALIAS, epochs=3, batch_rows=2, accumulation=2)
    found = plan(spec, ledger)
    assert (found.rows, found.steps, found.tokens) == (10, 9, 2700)
    assert plan(spec.model_copy(update={"max_steps": 5}), ledger).steps == 5
    in_turns = Ledger(accounts=ledger.accounts, rounds=(6, 4), row_tokens=100)  # epochs of 6, 4 and 6 rows: 2, 1 and 2 steps
    found = plan(spec, in_turns)
    assert (found.rows, found.steps, found.tokens) == (10, 5, 1440)
    assert "max_minutes" in plan(spec.model_copy(update={"max_minutes": 1.5}), ledger).reasons[-1]


def test_data_is_named_by_content_and_prepared_once(small_job, staged, tmp_path):
    moved = tmp_path / "other place"
    shutil.copytree(PAGES, moved)
    again = stage(small_job.model_copy(update={"data": (str(moved),)}), say=quiet)
    assert again.reused
    assert (again.train, again.channels, again.ledger) == (staged.train, staged.channels, staged.ledger)
    assert staged.train.model_digest == staged.model.digest
    assert staged.train.data_digest

    (moved / "harbour.txt").write_text("The harbour is closed on Sundays, and no boat may pass before noon.")
    other = stage(small_job.model_copy(update={"data": (str(moved),)}), say=quiet)
    assert not other.reused
    assert other.train.data_digest != staged.train.data_digest
    assert other.channels["train"] != staged.channels["train"]


def test_a_page_that_is_too_much_names_the_option_that_lets_it_pass(small_job):
    too_small = small_job.model_copy(update={"max_page_mb": 0.0001})
    with pytest.raises(DataError, match=r"larger than 100 bytes; raise max_page_mb \(--max-page-mb\)"):
        stage(too_small, say=quiet)
    with SiteServer({"/": Reply("late", wait_s=2)}) as site:
        values = {"data": (site.url("/"),), "allow_private_hosts": True, "max_page_seconds": 0.3}
        with pytest.raises(DataError, match=r"longer than 0\.3 s; raise max_page_seconds \(--max-page-seconds\)"):
            stage(small_job.model_copy(update=values), say=quiet)


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["max_page_mb", "max_page_seconds"])
def test_limits_of_a_page_are_real_ones(name, value):
    with pytest.raises(SpecError, match=name):
        Job(model=ALIAS, data=PAGES, **{name: value})


def test_edited_rules_do_not_find_the_rows_of_the_old_ones(tmp_path):
    (tmp_path / "xeon").mkdir()
    (tmp_path / "rules.py").write_text("LIMIT = 1")
    (tmp_path / "xeon" / "loss.py").write_text("")
    first = sources_digest(tmp_path)
    (tmp_path / "rules.cpython-311.pyc").write_bytes(b"compiled")
    assert sources_digest(tmp_path) == first
    (tmp_path / "xeon" / "loss.py").write_text("LIMIT = 1")
    edited = sources_digest(tmp_path)
    (tmp_path / "xeon" / "loss.py").rename(tmp_path / "loss.py")
    assert len({first, edited, sources_digest(tmp_path)}) == 3


def test_rows_are_named_by_the_runtime_that_made_them(staged):
    runtime = Path(importlib.util.find_spec("trimtab_runtime").origin).parent
    assert staged.channels["train"].parents[2].name.endswith(f"-{sources_digest(runtime)[:8]}")


def test_only_the_models_own_files_are_staged(small_job, tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "pytorch_model.bin").write_bytes(b"a pickle, which could run code")
    (model / "checkpoint-10").mkdir()
    train = small_job.train.model_copy(update={"model": str(model)})
    staged = stage(small_job.model_copy(update={"train": train}), cache=tmp_path / "cache", say=quiet)
    names = {path.name for path in staged.channels["model"].iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert names & {"pytorch_model.bin", "checkpoint-10"} == set()


def test_data_that_lost_a_byte_is_prepared_again(small_job, tmp_path):
    first = stage(small_job, cache=tmp_path, say=quiet)
    tokens = first.channels["train"] / "tokens.npy"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-1])
    again = stage(small_job, cache=tmp_path, say=quiet)
    assert not again.reused
    assert tokens.read_bytes() == whole


def test_an_interrupt_leaves_nothing_half_made_and_no_process(small_job, tmp_path):
    def interrupt(event: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage(small_job, cache=tmp_path, say=quiet, show=interrupt)
    assert list((tmp_path / "data").iterdir()) == []
    assert [pid for pid in Path("/proc").glob("[0-9]*") if works_in(pid, tmp_path)] == []


def works_in(pid: Path, folder: Path) -> bool:
    try:
        return (pid / "cwd").readlink().is_relative_to(folder)
    except OSError:
        return False


def test_the_runtimes_reason_is_given_when_data_cannot_be_prepared(small_job, tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}))
    train = small_job.train.model_copy(update={"model": str(model)})
    with pytest.raises(StagingError, match="names no eos_token") as caught:
        stage(small_job.model_copy(update={"train": train}), cache=tmp_path / "cache", say=quiet)
    assert "Traceback" not in str(caught.value)
    assert list((tmp_path / "cache" / "data").iterdir()) == []


def test_events_of_preparing_are_shown(small_job, tmp_path):
    seen = []
    staged = stage(small_job, cache=tmp_path, say=quiet, show=seen.append)
    assert [event.name for event in seen if isinstance(event, Phase)] == ["prepare"]
    assert complete(staged.channels["train"].parents[2])


@pytest.fixture
def job_with(tmp_path, small_job, staged):
    """The small job on a backend whose Python is a shell script; its data is prepared already."""

    def make(script: str) -> Job:
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        given = small_job.train.model_dump(exclude={"spec_version", "model_digest", "data_digest"})
        return Job(**given, data=PAGES, backend=ProcessBackend(tmp_path / "home", python=str(program)))

    return make


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(job_with, tmp_path, staged):
    job = job_with("exit 1")
    request = job.fit(dry_run="render", progress=False)
    assert request["hyperparameters"] == staged.train.to_hyperparameters()
    assert request["command"] == [str(tmp_path / "python"), "-P", "-m", "trimtab_runtime", "train"]
    assert not (tmp_path / "home").exists()


def test_a_failed_run_raises_while_it_is_waited_for_and_not_otherwise(job_with):
    job = job_with("echo no luck; exit 7")
    with pytest.raises(RunFailed, match="no luck") as caught:
        job.fit(progress=False)
    assert caught.value.log_tail == ("no luck",)
    run = job.fit(wait=False, progress=False)
    with pytest.raises(RunFailed, match=f"trimtab logs {run.handle}"):
        run.wait(30)


def test_ctrl_c_ends_the_waiting_and_not_the_run(job_with, capsys):
    job = job_with("trap 'exit 0' TERM; while :; do sleep 0.05; done")
    handles = []

    class Watched(ProcessBackend):
        def status(self, handle):
            handles.append(handle)
            if len(handles) == 2:
                _thread.interrupt_main()  # what the terminal does
            return super().status(handle)

    job.backend = Watched(job.backend.home, python=job.backend.python)
    with pytest.raises(KeyboardInterrupt):
        job.fit(progress=False)
    run = Run(handles[0], job.backend)
    assert f"trimtab stop {run.handle}" in capsys.readouterr().err
    assert not run.status().done
    run.stop()


def test_records_in_memory_are_data_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    rows = [{"prompt": "The mill was built in", "completion": " 1874."}]
    (source,) = Job(model="smollm2-135m-instruct", data=rows).spec.data
    assert [json.loads(line) for line in Path(source).read_text().splitlines()] == rows
    assert Job(model="smollm2-135m-instruct", data=[rows, "notes.txt"]).spec.data == (source, "notes.txt")
    with pytest.raises(DataError, match="type int"):
        Job(model="smollm2-135m-instruct", data=7)
