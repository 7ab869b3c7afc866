"""The table of training instances, the choice of one, and money as minutes."""

from __future__ import annotations

import re

import pytest
from botocore.session import Session
from hypothesis import given
from hypothesis import strategies as st

from trimtab import SpecError
from trimtab.aws import instances
from trimtab.aws.forecast import forecast
from trimtab.aws.instances import GRACE_MINUTES, SAVE_MINUTES, START_MINUTES, Instance, choose, cost, find, limits, minutes_for, spent_usd
from trimtab.estimate import ModelFacts
from trimtab.ledger import Account, Ledger
from trimtab.plan import Work, plan
from trimtab.spec import JobSpec, TrainSpec

LLAMA2_13B = {
    "num_hidden_layers": 40, "hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "vocab_size": 32000,
}  # fmt: skip
LEDGER = Ledger(accounts={"document": Account(samples=900, tokens=900_000, trained=900_000)}, rounds=(1000,), row_tokens=1024)
NAMES = sorted(instances.instances())


def job(device: str = "xeon", nodes: int = 1, **options: object) -> JobSpec:
    return JobSpec(train=TrainSpec(model="m", **options), data=("a",), device=device, nodes=nodes)


def work(model: bool = True) -> Work:
    return Work(LEDGER, ModelFacts.from_config(LLAMA2_13B) if model else None, model_mb=25_000)


def test_the_table_holds_what_sagemaker_trains_on():
    known = set(Session().get_service_model("sagemaker").shape_for("TrainingInstanceType").enum)
    assert set(instances.instances()) <= known
    ours = re.compile(r"ml\.(m7i|c7i|r7i|g5|g6|g6e|p4d|p4de|p5|p5e|p5en)\.")
    assert {name for name in known if ours.match(name)} <= set(instances.instances())


@pytest.mark.parametrize("family", ["m7i", "c7i", "r7i", "m6i", "c6i", "r6i", "m5"])
def test_a_familys_prices_and_memory_grow_with_its_processors(family):
    sizes = [one for name, one in instances.instances().items() if name.startswith(f"ml.{family}.")]
    assert len({one.memory_gib / one.vcpus for one in sizes}) == 1
    assert len({one.amx for one in sizes}) == 1
    rates = [one.usd_per_hour / one.vcpus for one in sizes]
    assert max(rates) / min(rates) < 1.02  # listed to a tenth of a cent


def test_what_is_estimated_is_said_and_stands_for_a_range():
    assert {one.name for one in instances.instances().values() if one.estimated} == {"ml.p5e.48xlarge", "ml.p5en.48xlarge"}
    one = find("ml.p5en.48xlarge")
    assert one.price == "about $72.79/h ($61.87 to $83.71)"
    assert str(cost(3600, one)) == "$61.87 to $83.71"
    assert find("ml.m7i.4xlarge").price == "$0.97/h"
    date, region = instances.listed()
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", date)
    assert region == "us-east-1"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("m7i.4xlarge", r"did you mean ml\.m7i\.4xlarge\?"),
        ("ML.M7I.LARGE", r"did you mean ml\.m7i\.large\?"),
        ("ml.m7i.4xlarg", r"did you mean ml\.m7i\.4xlarge\?"),
        ("a machine", "for example, ml.m7i.4xlarge"),
    ],
)
def test_an_unknown_type_is_answered_with_the_nearest(asked, said):
    with pytest.raises(SpecError, match=said):
        choose(job(), None, ask=asked)


def test_the_lowest_price_a_step_is_chosen_and_the_reason_says_so():
    found = choose(job(), 13_400)
    assert (found.name, found.warning) == ("ml.c7i.4xlarge", "")
    assert found.reason == "instance ml.c7i.4xlarge, $0.86/h: 13.1 GiB needed, 32 GiB there, AMX; the lowest price a step of 21 that fit"


@given(megabytes=st.integers(1, 1_300_000), device=st.sampled_from(["xeon", "gpu"]))
def test_whatever_is_chosen_holds_the_job_and_is_paid_for_nothing_idle(megabytes, device):
    try:
        found = choose(job(device), megabytes)
    except SpecError:
        assert not any(
            one.room_mb >= megabytes for one in instances.instances().values() if (one.gpus == 1 if device == "gpu" else one.amx)
        )
        return
    one = found.instance
    assert (one.gpus, one.amx) == ((1, False) if device == "gpu" else (0, True))
    assert megabytes * 1.15 < (one.gpu_memory_gib if one.gpus else one.memory_gib) * 1024
    assert found.reason.startswith(f"instance {one.name}, ")


@given(hours=st.floats(0.001, 1000), power=st.floats(0.7, 1))
def test_a_whole_job_costs_at_most_a_tenth_more_than_the_cheapest(hours, power):
    def seconds(one: Instance) -> float:
        return hours * 3600 / one.vcpus**power

    def whole(one: Instance) -> float:
        return one.usd_per_hour * (seconds(one) + 60 * (START_MINUTES + SAVE_MINUTES))

    found = choose(job(), 20_000, seconds=seconds).instance
    fitting = [one for one in instances.instances().values() if one.amx and one.room_mb >= 20_000]
    cheapest = min(whole(one) for one in fitting)
    assert whole(found) <= 1.1 * cheapest * (1 + 1e-9)
    assert not [one for one in fitting if whole(one) <= 1.1 * cheapest * (1 - 1e-9) and seconds(one) < seconds(found)]


def test_a_long_job_gets_more_processors_than_a_short_one():
    short, long = (choose(job(), 20_000, seconds=lambda one, hours=hours: hours * 3600 / one.vcpus**0.95) for hours in (0.1, 1000))
    assert short.instance.vcpus < long.instance.vcpus


def test_several_gpus_are_only_taken_by_name_and_with_a_warning():
    found = choose(job("gpu"), 15_000, ask="ml.g5.12xlarge")
    assert found.warning == "ml.g5.12xlarge has 4 GPUs and the run uses one: 3 are paid for and idle"
    assert found.reason.endswith(found.warning)
    assert choose(job("gpu"), 15_000, ask="ml.g5.xlarge").warning == ""
    with pytest.raises(SpecError, match=r"ml\.p5e\.48xlarge would do, with 8 GPUs of which one is used: name it"):
        choose(job("gpu"), 100_000)


def test_a_xeon_without_amx_may_be_asked_for_and_is_warned_of():
    found = choose(job(), 13_400, ask="ml.m6i.4xlarge")
    assert "NO AMX: a step takes several times as long as on ml.c7i.4xlarge" in found.warning
    assert choose(job(), 13_400, ask="ml.m7i.4xlarge").warning == ""


@pytest.mark.parametrize(
    ("device", "asked", "megabytes", "said"),
    [
        ("gpu", "ml.m7i.4xlarge", 13_400, r"has no GPU.*the smallest that does is ml\.g6\.xlarge.*--device xeon"),
        ("xeon", "ml.g5.xlarge", 13_400, "device xeon does not use.*--device gpu"),
        ("xeon", "ml.c7i.large", 13_400, r"too little memory: 13\.1 GiB needed.*4 GiB there.*the smallest that does is ml\.r7i\.xlarge"),
        ("gpu", "ml.g5.48xlarge", 33_400, r"22 GiB on each A10G; the smallest that does is ml\.g6e\.xlarge"),
        ("xeon", "ml.r7i.48xlarge", 2_000_000, r"the largest that is chosen by itself is ml\.r7i\.48xlarge.*lower max_seq_len"),
    ],
)
def test_a_type_that_cannot_run_the_job_is_refused_with_one_that_can(device, asked, megabytes, said):
    with pytest.raises(SpecError, match=said):
        choose(job(device), megabytes, ask=asked)


def test_a_need_that_nobody_knows_takes_a_middle_type_and_says_so():
    assert "does not name its sizes" in choose(job(), None).reason
    assert choose(job("gpu"), None).instance.gpus == 1


def test_cost_is_by_the_second_for_each_machine_and_less_for_spot():
    one = find("ml.m7i.4xlarge")
    assert cost(1800, one, 2).high == pytest.approx(0.968)
    assert cost(1800, one, 2).low == cost(1800, one, 2).high
    assert cost(1800, one, 2, spot=True).low == pytest.approx(0.3 * 0.968)
    assert cost(1800, one, 2, spot=True).high == pytest.approx(0.968)
    assert minutes_for(0.968, one, 2) == pytest.approx(30)


@given(
    name=st.sampled_from(NAMES),
    usd=st.floats(0.01, 1e6),
    minutes=st.none() | st.floats(0.01, 1e6),
    nodes=st.integers(1, 64),
    keep=st.integers(0, 21_600),
    megabytes=st.integers(0, 200_000),
    step=st.floats(0, 600),
    spent=st.just(0.0) | st.floats(0, 1e5),
    region=st.sampled_from([None, "us-east-1", "sa-east-1"]),
)
def test_money_is_never_exceeded_and_always_leaves_time_to_save(name, usd, minutes, nodes, keep, megabytes, step, spent, region):
    one = find(name, region)
    further = {"keep_alive_seconds": keep, "model_mb": megabytes, "pass_seconds": step, "spent_usd": spent}
    try:
        found = limits(usd, minutes, one, nodes, **further)
    except SpecError as exc:
        least = float(re.search(r"raise max_usd to ([\d.]+) at least", str(exc))[1])
        assert least > usd
        assert limits(least, minutes, one, nodes, **further).max_runtime_seconds > 0
        return
    billed = found.max_runtime_seconds + GRACE_MINUTES * 60 + keep
    assert spent + cost(billed, one, nodes).high <= usd * (1 + 1e-9)
    assert spent + found.max_usd <= usd * (1 + 1e-9)
    assert found.max_minutes is None or 0 < found.max_minutes <= (minutes or float("inf"))
    around = START_MINUTES + SAVE_MINUTES + megabytes / 6000 + step / 60
    if found.max_minutes is not None:
        assert found.max_minutes + around <= found.max_runtime_seconds / 60 + 0.02  # so that it is saved before
    assert 1 <= found.max_runtime_seconds <= 2_419_200


def test_limits_have_their_reasons():
    one = find("ml.m7i.4xlarge")
    usual = limits(None, None, one)
    assert usual.max_runtime_seconds == 86_400
    assert usual.reasons == (
        "time at most 1 day, SageMaker's own default, then it is stopped with a checkpoint: for longer set max_minutes, such as "
        "--max-minutes 2880",
    )
    assert limits(None, 2880, one).max_runtime_seconds == (2880 + 10) * 60
    assert limits(None, None, one).max_minutes is None
    assert limits(None, 30, one).max_runtime_seconds == 40 * 60
    found = limits(1, 60, one)
    assert found.max_minutes == pytest.approx(48, abs=0.1)
    assert "the run ends itself after 48.0 min with checkpoint and artifact, the hard stop comes at 58.0 min" in found.reasons[1]
    assert "more than the time limit" in limits(100, 60, one).reasons[1]
    assert limits(None, 1e6, one).max_runtime_seconds == 28 * 86_400
    assert "28 days" in limits(None, 1e6, one).reasons[-1]
    with pytest.raises(SpecError, match=r"\$0\.10 buys 6\.2 minutes of ml\.m7i\.4xlarge at \$0\.97/h; .* raise max_usd to 0\.25 at least"):
        limits(0.1, None, one)


def life(kind: str, seconds: int, count: int = 1, **more: object) -> dict[str, object]:
    return {
        "ResourceConfig": {"InstanceType": kind, "InstanceCount": count, **more.pop("resources", {})},
        "BillableTimeInSeconds": seconds,
        **more,
    }


def test_what_earlier_lives_cost_is_billed_time_by_machines_by_the_highest_price():
    assert spent_usd([]) == 0
    assert spent_usd([life("ml.m7i.4xlarge", 1800, 2), life("ml.c7i.4xlarge", 3600)]) == pytest.approx(0.968 + 0.857)
    assert spent_usd([life("ml.m7i.4xlarge", 3600)], "eu-west-1") == pytest.approx(1.7 * 0.968)
    assert spent_usd([life("ml.p5en.48xlarge", 3600)]) == pytest.approx(1.15 * 72.79)
    assert spent_usd([{"ResourceConfig": {"InstanceType": "ml.m7i.4xlarge", "InstanceCount": 1}}]) == 0  # it never began
    kept = {"resources": {"KeepAlivePeriodInSeconds": 3600}}
    waiting = life("ml.m7i.4xlarge", 0, WarmPoolStatus={"Status": "Available", "ResourceRetainedBillableTimeInSeconds": 60}, **kept)
    assert spent_usd([waiting]) == pytest.approx(0.968)
    ended = life("ml.m7i.4xlarge", 0, WarmPoolStatus={"Status": "Terminated", "ResourceRetainedBillableTimeInSeconds": 1800}, **kept)
    assert spent_usd([ended]) == pytest.approx(0.484)


def test_a_resumed_run_has_what_is_left_of_its_money_at_the_price_of_its_new_machine():
    first = forecast(job(), work(), ask="ml.m7i.16xlarge", max_usd=9).limits
    spent = spent_usd([life("ml.m7i.16xlarge", 3600)])
    again = forecast(job(), work(), ask="ml.m7i.16xlarge", max_usd=9, spent_usd=spent).limits
    assert again.max_runtime_seconds == pytest.approx(first.max_runtime_seconds - 3600, abs=1)
    assert again.max_minutes == pytest.approx(first.max_minutes - 60, abs=0.01)
    assert any(reason.startswith("money $9.00 less $3.87 that the run has cost: ") for reason in again.reasons)
    dearer = forecast(job(), work(), ask="ml.m7i.24xlarge", max_usd=9, spent_usd=spent).limits
    assert dearer.max_runtime_seconds + 60 * GRACE_MINUTES == pytest.approx((9 - spent) / 5.806 * 3600, abs=1)
    with pytest.raises(
        SpecError, match=r"\$9\.00 less \$9\.50 that the run has cost buys 0\.0 minutes .* raise max_usd to 1[01]\.\d\d at least"
    ):
        forecast(job(), work(), ask="ml.m7i.16xlarge", max_usd=9, spent_usd=9.5)


def test_another_region_may_be_dearer_and_money_counts_on_it():
    here, there = (forecast(job(), work(), ask="ml.m7i.16xlarge", max_usd=9, region=region) for region in ("us-east-1", "sa-east-1"))
    assert find("ml.m7i.16xlarge", "sa-east-1").price == "about $3.87/h ($3.87 to $6.58)"
    assert there.limits.max_runtime_seconds < here.limits.max_runtime_seconds
    hours = (there.limits.max_runtime_seconds + 60 * GRACE_MINUTES) / 3600
    assert hours * 3.871 * 1.7 <= 9
    assert there.foreseen.price.high <= 9
    assert "sa-east-1 is not listed and may cost up to 1.7 times as much, which max_usd counts on" in there.foreseen.reasons[-1]
    assert "as much" not in here.foreseen.reasons[-1]
    dear, plain = (
        forecast(job(max_minutes=600), work(), ask="ml.m7i.16xlarge", region=region).foreseen.price for region in ("sa-east-1", None)
    )
    assert (dear.low, dear.high) == (plain.low, pytest.approx(1.7 * plain.high))
    assert choose(job(), 20_000, region="sa-east-1").name == choose(job(), 20_000).name


def test_a_pass_that_outlasts_sagemakers_patience_is_told_and_kept_free():
    slow = forecast(job(max_minutes=600, accumulation=2), work(), ask="ml.r6i.4xlarge")
    said = next(reason for reason in slow.foreseen.reasons if reason.startswith("time of a pass"))
    step = float(re.search(r"about ([\d,]+) s: SageMaker ends a job 120 s after", said)[1].replace(",", ""))
    assert step > 60
    around = slow.limits.max_runtime_seconds / 60 - 600 - 25_000 / 6000
    assert around == pytest.approx(START_MINUTES + SAVE_MINUTES + 2 * step / 60, abs=0.05)
    twice = forecast(job(max_minutes=600, accumulation=4), work(), ask="ml.r6i.4xlarge").foreseen.reasons
    assert said in twice  # it looks between the passes of a step
    quick = forecast(job(max_minutes=600, accumulation=64), work(), ask="ml.m7i.48xlarge").foreseen.reasons
    assert not [reason for reason in quick if reason.startswith("time of a pass")]


def test_more_work_than_a_day_takes_is_told():
    found = forecast(job(epochs=30), work(), ask="ml.m7i.8xlarge").foreseen
    said = next(reason for reason in found.reasons if reason.startswith("time ends"))
    assert "with a checkpoint, from which  trimtab resume  goes on" in said


def test_a_forecast_names_machine_time_price_and_every_reason():
    found = forecast(job(), work()).foreseen
    assert find(found.instance).amx
    assert find(found.instance).vcpus >= 16  # hours on fewer
    assert found.memory.total > 30_000
    assert found.time.low < found.time.seconds < found.time.high
    assert found.time.source == "stated table"
    assert 0 < found.price.low < found.price.high
    assert [reason.split(" ")[0] for reason in found.reasons] == ["instance", "time", "price"]
    assert "as listed on 20" in found.reasons[-1]


def test_a_plan_and_its_request_never_choose_apart():
    asked = forecast(job(), work()).foreseen.instance
    named = forecast(job(), work(), ask=asked)
    assert named.limits == forecast(job(), work()).limits
    assert named.foreseen.time == forecast(job(), work()).foreseen.time


def test_a_budget_ends_the_run_before_its_last_step_and_bounds_the_price():
    found = forecast(job(), work(), max_usd=2).foreseen
    assert found.price.high <= 2
    said = next(reason for reason in found.reasons if reason.startswith("time ends"))
    steps = re.search(r"after about ([\d,]+) of 5,000 steps", said)[1]
    assert 0 < int(steps.replace(",", "")) < 5000
    assert any(reason.startswith("money $2.00") for reason in found.reasons)


def test_more_work_takes_longer_and_spot_may_cost_less():
    weeks = {"max_minutes": 30_000}
    plain = forecast(job(**weeks), work(), ask="ml.m7i.8xlarge").foreseen
    assert forecast(job(epochs=10, **weeks), work(), ask="ml.m7i.8xlarge").foreseen.time.seconds > plain.time.seconds
    assert forecast(job(**weeks), work(), ask="ml.m7i.16xlarge").foreseen.time.seconds < plain.time.seconds
    assert forecast(job(**weeks), work(), ask="ml.m6i.8xlarge").foreseen.time.seconds > 3 * plain.time.seconds
    spot = forecast(job(**weeks), work(), ask="ml.m7i.8xlarge", spot=True).foreseen
    assert spot.price.low == pytest.approx(0.3 * plain.price.low)
    assert spot.price.high == plain.price.high
    kept = forecast(job(**weeks), work(), ask="ml.m7i.8xlarge", keep_alive_seconds=600).foreseen
    assert kept.price.high == pytest.approx(plain.price.high + cost(600, find("ml.m7i.8xlarge")).high)


def test_a_model_that_names_no_sizes_has_no_time_and_a_price_up_to_the_hard_stop():
    found = forecast(job(max_minutes=50), work(model=False)).foreseen
    assert (found.time, found.memory) == (None, None)
    assert found.price.low == 0
    assert found.price.high == forecast(job(max_minutes=50), work(model=False)).limits.max_usd
    text = "\n".join(plan(job().train, LEDGER, foreseen=found).lines())
    assert "not known" in text
