"""What a job takes on SageMaker before it is sent: machine, memory, time, price and limits, each with its reason. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.aws import instances
from trimtab.aws.instances import Chosen, Instance, Limits
from trimtab.estimate import Rates, dtype_of, optimiser_steps, peak_memory, step_seconds
from trimtab.plan import Foreseen, Price, Time, Work
from trimtab.spec import JobSpec

STATED_FROM, STATED_TO = 0.5, 2.0  # stated rates may be wrong by so much
PATIENT_PASS = 60.0  # seconds; a pass that takes longer may not end, and all be saved, in the 120 that SageMaker gives before it kills


@dataclass(frozen=True)
class Forecast:
    """The machine that is asked for, what bounds the job there, and what a plan says of it."""

    chosen: Chosen
    limits: Limits
    foreseen: Foreseen


def forecast(
    spec: JobSpec,
    work: Work,
    *,
    ask: str | None = None,
    max_usd: float | None = None,
    spot: bool = False,
    keep_alive_seconds: int = 0,
    region: str | None = None,
    spent_usd: float = 0.0,
) -> Forecast:
    """`ask` names the instance type, else one is chosen; `max_usd` bounds the whole job; `keep_alive_seconds` is a warm pool after it.

    Prices are `region`'s, as far as they are known. `spent_usd` is what the run's earlier training jobs cost (`instances.spent_usd`):
    with it this is the forecast of a resumed run, whose limits are by what is left of the money.

    Raises SpecError for a job that no machine holds, a type that cannot run it, and money that does not pay for starting and saving.
    """
    model, gpu = work.model, spec.device == "gpu"
    flags = ["gpu_bf16"] if gpu else ["amx_bf16"] if ask is None or instances.find(ask).amx else []
    dtype = dtype_of(spec.train.dtype, flags)
    memory = peak_memory(spec.train, model, dtype, work.rows, "gpu" if gpu else "cpu") if model is not None else None
    steps, _ = optimiser_steps(spec.train, work.ledger.rounds, spec.train.sharing(spec.nodes))

    def seconds(instance: Instance) -> float:
        assert model is not None
        return steps * step_seconds(spec.train, model, rates_of(instance, dtype), work.rows, spec.nodes)

    chosen = instances.choose(
        spec, memory.total * spec.train.sharing() if memory else None, ask=ask, seconds=seconds if model else None, region=region
    )
    training = seconds(chosen.instance) if model else None
    one_pass = training / max(1, steps) / spec.train.accumulation if training is not None else 0.0
    bounds = instances.limits(
        max_usd,
        spec.train.max_minutes,
        chosen.instance,
        spec.nodes,
        keep_alive_seconds=keep_alive_seconds,
        model_mb=work.model_mb,
        pass_seconds=STATED_TO * one_pass,
        spent_usd=spent_usd,
    )
    time = _time(training, bounds, work) if training is not None else None
    price = _price(time, chosen.instance, spec.nodes, bounds, spot=spot, keep_alive_seconds=keep_alive_seconds)
    reasons = [chosen.reason, *bounds.reasons, *_of_time(training, steps, bounds), *_of_pass(one_pass)]
    reasons.append(_of_price(chosen.instance, spec.nodes, spot, keep_alive_seconds, region))
    return Forecast(chosen, bounds, Foreseen(chosen.name, memory, time, price, tuple(reasons), bounds.max_runtime_seconds))


def rates_of(instance: Instance, dtype: str) -> Rates:
    """What the table states of a machine, as the estimate takes it."""
    return Rates.stated("bfloat16" if dtype == "bfloat16" else "float32", instance.flops, instance.bandwidth, instance.network)


def _time(training: float, bounds: Limits, work: Work) -> Time:
    """The whole job's, from the first billed second to the last."""
    around = (instances.START_MINUTES + instances.SAVE_MINUTES) * 60 + work.model_mb / 100
    own = bounds.max_minutes * 60 if bounds.max_minutes is not None else bounds.max_runtime_seconds
    low, likely, high = (min(own, share * training) + around for share in (STATED_FROM, 1, STATED_TO))
    return Time(likely, low, high, "stated table")


def _price(time: Time | None, instance: Instance, nodes: int, bounds: Limits, *, spot: bool, keep_alive_seconds: int) -> Price:
    if time is None:  # nobody knows how long it takes, but it cannot cost more than the hard stop lets it
        return Price(0.0, bounds.max_usd)
    low = instances.cost(time.low, instance, nodes, spot=spot).low
    high = instances.cost(time.high + keep_alive_seconds, instance, nodes).high
    return Price(low, min(high, bounds.max_usd))


def _of_time(training: float | None, steps: int, bounds: Limits) -> list[str]:
    if training is None:
        return ["time unknown: the model does not name its sizes; --dry-run runs two steps there, which are paid for"]
    own = bounds.max_minutes if bounds.max_minutes is not None else bounds.max_runtime_seconds / 60
    if training <= own * 60:
        return []
    left = "checkpoint and artifact" if bounds.max_minutes is not None else "a checkpoint, from which  trimtab resume  goes on"
    return [f"time ends the run after about {int(steps * own * 60 / training):,} of {steps:,} steps, with {left}; {_all_of(training)}"]


def _all_of(training: float) -> str:
    return f"all would take {training / 60:,.0f} min"


def _of_pass(seconds: float) -> list[str]:
    """A run looks between the passes of its steps whether it is to stop; the 120 s are those of StoppingCondition, API reference."""
    if seconds <= PATIENT_PASS:
        return []
    return [
        f"time of a pass about {seconds:,.0f} s: SageMaker ends a job 120 s after it asks it to stop, so a stop or a spot interruption may "
        "lose what was done since the last checkpoint; lower batch_rows, or save oftener with save_every_minutes"
    ]


def _of_price(instance: Instance, nodes: int, spot: bool, keep_alive_seconds: int, region: str | None) -> str:
    date, listed = instances.listed()
    said = f"price for {nodes} x {instance.name} on demand, {instance.price} each, in {listed} as listed on {date}"
    if region is None:
        said += "; other regions differ"
    elif instance.dearer > 1:
        said += f"; {region} is not listed and may cost up to {instance.dearer:g} times as much, which max_usd counts on"
    if instance.estimated:
        said += "; computed by a rule, not listed"
    if spot:
        said += f"; spot costs from {instances.SPOT_FROM:.0%} of that, by the hour"
    if keep_alive_seconds:
        said += f"; {keep_alive_seconds / 60:,.3g} min of warm pool included"
    return said
