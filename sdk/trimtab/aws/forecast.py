"""What a job takes on SageMaker before it is sent: machine, memory, time, price and limits, each with its reason. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.aws import instances
from trimtab.aws.instances import Chosen, Instance, Limits
from trimtab.estimate import Rates, dtype_of, optimiser_steps, peak_memory, step_seconds
from trimtab.plan import Foreseen, Price, Time, Work
from trimtab.spec import JobSpec

STATED_FROM, STATED_TO = 0.5, 2.0  # stated rates may be wrong by so much


@dataclass(frozen=True)
class Forecast:
    """The machine that is asked for, what bounds the job there, and what a plan says of it."""

    chosen: Chosen
    limits: Limits
    foreseen: Foreseen


def forecast(
    spec: JobSpec, work: Work, *, ask: str | None = None, max_usd: float | None = None, spot: bool = False, keep_alive_seconds: int = 0
) -> Forecast:
    """`ask` names the instance type, else one is chosen; `max_usd` bounds the whole job; `keep_alive_seconds` is a warm pool after it.

    Raises SpecError for a job that no machine holds, a type that cannot run it, and money that does not pay for starting and saving.
    """
    model, gpu = work.model, spec.device == "gpu"
    flags = ["gpu_bf16"] if gpu else ["amx_bf16"] if ask is None or instances.find(ask).amx else []
    dtype = dtype_of(spec.train.dtype, flags)
    memory = peak_memory(spec.train, model, dtype, work.rows, "gpu" if gpu else "cpu") if model is not None else None
    steps, _ = optimiser_steps(spec.train, work.ledger.rounds, spec.nodes)

    def seconds(instance: Instance) -> float:
        assert model is not None
        return steps * step_seconds(spec.train, model, rates_of(instance, dtype), work.rows, spec.nodes)

    chosen = instances.choose(spec, memory.total if memory else None, ask=ask, seconds=seconds if model else None)
    bounds = instances.limits(
        max_usd,
        spec.train.max_minutes,
        chosen.instance,
        spec.nodes,
        keep_alive_seconds=keep_alive_seconds,
        model_mb=work.model_mb,
    )
    time = _time(seconds(chosen.instance), bounds, work) if model else None
    price = _price(time, chosen.instance, spec.nodes, bounds, spot=spot, keep_alive_seconds=keep_alive_seconds)
    reasons = [chosen.reason, *bounds.reasons, *_of_time(seconds(chosen.instance) if model else None, steps, bounds)]
    reasons.append(_of_price(chosen.instance, spec.nodes, spot, keep_alive_seconds))
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
    if bounds.max_minutes is None or training <= bounds.max_minutes * 60:
        return []
    done = int(steps * bounds.max_minutes * 60 / training)
    return [
        f"time ends the run after about {done:,} of {steps:,} steps, with checkpoint and artifact; all would take {training / 60:,.0f} min"
    ]


def _of_price(instance: Instance, nodes: int, spot: bool, keep_alive_seconds: int) -> str:
    date, region = instances.listed()
    said = f"price for {nodes} x {instance.name} on demand, {instance.price} each, in {region} as listed on {date}; other regions differ"
    if instance.estimated:
        said += "; computed by a rule, not listed"
    if spot:
        said += f"; spot costs from {instances.SPOT_FROM:.0%} of that, by the hour"
    if keep_alive_seconds:
        said += f"; {keep_alive_seconds / 60:,.3g} min of warm pool included"
    return said
