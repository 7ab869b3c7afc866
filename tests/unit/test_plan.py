"""A plan says what a job takes, by what, what it costs and what is missing, before anything is paid for."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from support.cloud import ControlPlane
from trimtab import BackendUnavailable, Job, SpecError, StagingError
from trimtab.aws.forecast import forecast
from trimtab.backends.process import ProcessBackend
from trimtab.cli import main
from trimtab.estimate import ModelFacts, PeakMemory, Rates, step_seconds
from trimtab.ledger import Account, Ledger
from trimtab.plan import Finding, Foreseen, Plan, Price, Time, Work, measured, plan, room
from trimtab.spec import JobSpec, TrainSpec
from trimtab.staging import Staged

PAGES = Path(__file__).parents[1] / "support" / "pages"
LEDGER = Ledger(accounts={"document": Account(samples=9, tokens=900, trained=900)}, rounds=(10,), row_tokens=100)
SPEC = TrainSpec(model="m", epochs=3)
MEMORY = PeakMemory(runtime=400, base=100, trained=10, activations=80, logits=5)
FORESEEN = Foreseen(
    instance="ml.m7i.4xlarge",
    memory=MEMORY,
    time=Time(600, 300, 1200, "stated table"),
    price=Price(0.1, 0.4),
    reasons=("instance ml.m7i.4xlarge, $0.97/h: 0.6 GiB needed", "money $1.00: enough", "time at most 5 days: a quota", "price as listed"),
)
SECTIONS = ("recipe", "data", "steps", "memory", "time", "place", "price", "permissions", "missing")


def sections(lines: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in lines:
        name, rest = line[:13].strip(), line[13:]
        found.setdefault(name or list(found)[-1], []).append(rest)
    return found


def job(small_job: JobSpec, home: Path, **changes: object) -> Job:
    given = small_job.train.model_dump(exclude={"spec_version", "model_digest", "data_digest"})
    return Job(**{"backend": ProcessBackend(home), **given, **changes}, data=PAGES)


def test_what_a_place_foresees_stands_in_the_plan_with_its_reasons():
    found = plan(SPEC, LEDGER, foreseen=FORESEEN)
    assert (found.instance, found.time, found.price, found.memory) == ("ml.m7i.4xlarge", FORESEEN.time, FORESEEN.price, MEMORY)
    assert found.memory_mb == MEMORY.total == 595
    assert found.reasons[-4:] == FORESEEN.reasons
    assert found.missing == ()


def test_only_what_is_not_there_is_missing_and_says_what_to_type():
    findings = [
        Finding("identity", True, "somebody"),
        Finding("role", False, "does not exist", "aws iam create-role"),
        Finding("image", None, "could not be asked"),
    ]
    found = plan(SPEC, LEDGER, foreseen=FORESEEN, findings=findings)
    assert found.missing == ("role: does not exist  ->  aws iam create-role",)
    assert found.findings == tuple(findings)


def test_the_page_has_its_sections_in_order_and_each_reason_in_its_own():
    findings = [
        Finding("permission s3:GetObject", True, "allowed on x"),
        Finding("image", None, "could not be asked"),
        Finding("memory", True, "595 MB needed, 9,999 MB in this machine"),
        Finding("role", False, "does not exist", "aws iam create-role"),
    ]
    found = dataclasses.replace(plan(SPEC, LEDGER, 2, foreseen=FORESEEN, findings=findings), place="sagemaker")
    page = sections(found.lines())
    assert tuple(page) == SECTIONS
    assert page["data"] == ["10 rows", "tokens 2,700: what 15 steps see, each pass counted"]
    assert page["time"] == [
        "about 10:00 (5:00 to 20:00), by stated rates, which were not measured: --dry-run measures",
        "at most 5 days: a quota",
    ]
    assert page["place"] == ["sagemaker, 2 machines", "ml.m7i.4xlarge, $0.97/h: 0.6 GiB needed"]
    assert page["price"] == ["$0.10 to $0.40", "money $1.00: enough", "as listed"]
    assert page["permissions"] == ["there: s3:GetObject", "not known: image: could not be asked"]
    assert page["memory"][-1] == "595 MB needed, 9,999 MB in this machine"
    assert page["missing"] == ["role: does not exist  ->  aws iam create-role"]


def test_what_nobody_knows_is_said():
    page = sections(plan(SPEC, LEDGER).lines())
    assert page["time"] == ["not known; --dry-run runs two steps of the job, and knows it by them"]
    assert page["price"] == ["nothing is paid"]
    assert page["missing"] == ["nothing that is known"]


def test_a_plan_is_one_json_value():
    found = plan(SPEC, LEDGER, foreseen=FORESEEN, findings=[Finding("role", None, "who knows")])
    facts = json.loads(json.dumps(dataclasses.asdict(found)))
    assert facts["time"] == {"seconds": 600, "low": 300, "high": 1200, "source": "stated table"}
    assert facts["price"] == {"low": 0.1, "high": 0.4}
    assert facts["memory"]["activations"] == 80
    assert facts["findings"] == [{"name": "role", "ok": None, "detail": "who knows", "remedy": ""}]


def test_what_is_not_known_for_the_same_reason_is_one_line():
    findings = [Finding(name, None, "nobody answers", "ask later") for name in ("image", "role")]
    findings += [Finding("bucket", None, "it is another account's"), Finding("permission s3:GetObject", True, "")]
    findings += [Finding(f"permission of the role s3:{name}", True, "") for name in ("GetObject", "PutObject")]
    page = sections(plan(SPEC, LEDGER, findings=findings).lines())
    assert page["permissions"][:2] == ["there: s3:GetObject", "there for the role: s3:GetObject, s3:PutObject"]
    assert page["permissions"][2:] == [
        "not known: image, role: nobody answers  ->  ask later",
        "not known: bucket: it is another account's",
    ]


def test_a_dry_run_takes_the_place_of_what_was_stated():
    found = measured(plan(SPEC, LEDGER, foreseen=FORESEEN), 1200, 700)
    assert (found.time.seconds, found.time.source, found.memory_mb) == (1200, "dry run", 700)
    assert found.time.low < 1200 < found.time.high
    assert found.price == Price(pytest.approx(0.1 * found.time.low / 300), pytest.approx(0.4 * found.time.high / 1200))
    assert [reason for reason in found.reasons if reason.startswith("memory")] == [
        "memory about 700 MB: what two steps took, or the estimate where rows of longer samples may take more"
    ]
    assert measured(plan(SPEC, LEDGER), 60, 700).price is None


def test_this_machine_has_room_for_little_and_not_for_everything():
    assert [finding.ok for finding in room(MEMORY)] == [True]
    too_much = room(dataclasses.replace(MEMORY, base=1 << 40))
    assert [finding.ok for finding in too_much] == [False]
    assert "--backend sagemaker" in too_much[0].remedy
    assert room(None) == []


def test_work_is_read_from_the_channels_as_a_backend_gets_them(staged: Staged, tmp_path):
    work = Work.read(staged.channels)
    assert work.ledger == staged.ledger
    assert work.model == ModelFacts.from_config(json.loads((staged.model.folder / "config.json").read_text()))
    assert work.rows is not None
    assert work.model_mb == sum(path.stat().st_size for path in staged.channels["model"].iterdir()) >> 20
    assert Work.from_json(json.loads(json.dumps(work.as_json()))) == work
    assert Work.from_json({"ledger": work.as_json()["ledger"]}) == Work(work.ledger)
    for damaged in ({}, {"ledger": {}}, {**work.as_json(), "model": {"layers": 1}}, {**work.as_json(), "rows": {"mean": 1}}):
        with pytest.raises(ValueError, match=r"no account of a job's work|validation error"):
            Work.from_json(damaged)
    with pytest.raises(StagingError, match="run the same command again"):
        Work.read({**staged.channels, "train": tmp_path})
    for name in ("train", "model"):
        shutil.copytree(staged.channels[name], tmp_path / name)
    (tmp_path / "model" / "config.json").write_text("[]")
    (tmp_path / "train" / "manifest.json").unlink()
    bare = Work.read({name: tmp_path / name for name in ("train", "model")})
    assert (bare.model, bare.rows) == (None, None)


def test_a_plan_for_this_machine_asks_nobody_and_starts_nothing(small_job, staged, tmp_path, monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    found = job(small_job, tmp_path).plan(progress=False)
    assert (found.place, found.steps, found.price, found.instance) == ("process", 6, None, None)
    assert [finding.name for finding in found.findings] == ["memory"]
    assert found.memory.total == found.memory_mb > 0
    assert not (tmp_path / "runs").exists()


def test_rates_that_were_measured_here_tell_the_time(small_job, staged, tmp_path):
    tree = staged.channels["train"].parents[2]
    rates = Rates.stated("float32", 5e10, 1e10)
    asked = job(small_job, tmp_path)
    assert asked.plan(progress=False).time is None
    file = tree / "output" / "data" / "rates.json"
    file.write_text(rates.model_dump_json())
    try:
        found = asked.plan(progress=False)
        assert found.time.source == "rates measured on this machine"
        work = Work.read(staged.channels)
        assert found.time.seconds == pytest.approx(6 * step_seconds(staged.train, work.model, rates, work.rows))
        assert found.time.low == pytest.approx(0.8 * found.time.seconds)
        assert "start and saving come on top" in sections(found.lines())["time"][-1]
        capped = job(small_job, tmp_path, max_minutes=1e-5).plan(progress=False)
        assert capped.time.high == pytest.approx(6e-4)
        file.write_text("{}")
        assert asked.plan(progress=False).time is None
    finally:
        file.unlink()


class Absent(ProcessBackend):
    """A place whose software is not there."""

    def check(self, spec: JobSpec) -> None:
        raise BackendUnavailable("no engine answers: start it with  systemctl start docker")


class Refusing(ProcessBackend):
    def check(self, spec: JobSpec) -> None:
        raise SpecError("device gpu needs a GPU: take another")


def test_a_place_that_is_not_there_is_missing_and_the_rest_is_planned(small_job, staged, tmp_path):
    found = job(small_job, tmp_path, backend=Absent(tmp_path)).plan(progress=False)
    assert found.missing == ("process: no engine answers: start it with  systemctl start docker",)
    assert found.steps == 6
    with pytest.raises(SpecError, match="device gpu needs a GPU"):
        job(small_job, tmp_path, backend=Refusing(tmp_path)).plan(progress=False)


class Paid(ProcessBackend):
    """A place that has a price, foreseen by the table of instances."""

    lack: Finding | None = None
    asked = 0

    def foresee(self, spec: JobSpec, work: Work) -> Foreseen:
        return forecast(spec, work).foreseen

    def findings(self, spec: JobSpec, foreseen: Foreseen) -> list[Finding]:
        self.asked += 1
        return [self.lack] if self.lack else []


def test_a_place_that_is_paid_for_foresees_and_is_asked_only_by_a_plan(small_job, staged, tmp_path):
    place = Paid(tmp_path)
    found = job(small_job, tmp_path, backend=place).plan(progress=False)
    assert found.instance == "ml.c7i.large"  # six small steps need no more
    assert 0 < found.price.low <= found.price.high < 0.1
    assert place.asked == 1
    place.lack = Finding("role", False, "does not exist", "aws iam create-role")
    assert job(small_job, tmp_path, backend=place).plan(progress=False).missing == (str(place.lack),)


def test_a_plan_with_a_dry_run_is_measured_and_priced_by_it(small_job, staged, tmp_path):
    place = Paid(tmp_path)
    found = job(small_job, tmp_path, backend=place).plan(dry_run=True, progress=False)
    assert place.asked == 1  # the dry run itself asks nothing
    assert found.time.source == "dry run"
    assert 0 < found.time.low < found.time.seconds < found.time.high
    assert 0 < found.price.low < found.price.high
    assert found.steps == 6
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.fixture
def line(small_job: JobSpec) -> list[str]:
    options = ["--model", small_job.train.model, "--method", "lora", "--lora-rank", "4", "--dtype", "float32", "--max-seq-len", "128"]
    return [str(PAGES), *options, "--questions", "0", "--replay", "0", "--learning-rate", "1e-3"]


def test_the_command_prints_sections_and_ends_with_0_when_nothing_is_missing(line, staged, capsys):
    assert main(["plan", *line]) == 0
    assert tuple(sections(capsys.readouterr().out.splitlines())) == tuple(name for name in SECTIONS if name != "permissions")
    assert main(["plan", *line, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == set(Plan.__dataclass_fields__)


def test_a_plan_for_sagemaker_is_asked_of_the_account_and_ends_with_1(line, staged, localstack, monkeypatch, tmp_path, capsys):
    with ControlPlane(aws_url=localstack, runner=None) as plane:
        monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path))
        for name, value in {"": localstack, "_SAGEMAKER": plane.url, "_SERVICE_QUOTAS": plane.url}.items():
            monkeypatch.setenv(f"AWS_ENDPOINT_URL{name}", value)
        for name, value in {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}.items():
            monkeypatch.setenv(name, value)
        settings = ["--backend", "sagemaker", "--backend-option", "role=no-such-role", "--max-usd", "0.5"]
        assert main(["plan", *line, *settings]) == 1
        page = sections(capsys.readouterr().out.splitlines())
        assert plane.requests
        assert {operation for operation, _ in plane.requests} <= {"ListServiceQuotas", "ListTrainingJobs"}
    assert any("ml.c7i.large" in text for text in page["place"])
    assert any(text.startswith("money $0.50: ") for text in page["price"])
    assert page["missing"][0].startswith("role: arn:aws:iam::000000000000:role/no-such-role does not exist  ->  aws iam create-role")
    assert any("quota ml.c7i.large for training job usage" in text for text in page["permissions"])
