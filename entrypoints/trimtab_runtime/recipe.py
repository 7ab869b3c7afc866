"""One packed training run, top to bottom. Read it before you change it; its parts with a choice in them stand beside it
as pure functions (choices.py, packing.py), and nothing is underneath but torch, transformers and PEFT."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trimtab.counting import counted
from trimtab.errors import TrimtabError
from trimtab.estimate import epoch_steps, optimiser_steps
from trimtab.events import Checkpoint, Choice, EventLog, Phase, Progress, Step
from trimtab.layout import DEVICE_VARIABLE, JobDir
from trimtab.sizes import ModelFacts
from trimtab.spec import TrainSpec
from trimtab_runtime import artifact, checkpoint, disk, prepare
from trimtab_runtime.batch import as_batch, batch_loss
from trimtab_runtime.choices import Choice as Made
from trimtab_runtime.choices import (
    cpu_flags,
    expected_memory,
    gpu_flags,
    learning_rate,
    method_line,
    pick_device,
    pick_dtype,
    recomputed,
    saved_dtype,
    schedule,
    short_of_memory,
)
from trimtab_runtime.distributed import ALONE, Team
from trimtab_runtime.memory import memory_there, peak_memory_mb
from trimtab_runtime.methods import trained_parts
from trimtab_runtime.model import load_model, read_config
from trimtab_runtime.rows import PackedRows
from trimtab_runtime.xeon import kernels
from trimtab_runtime.xeon.allocator import KEPT, keep_large_blocks
from trimtab_runtime.xeon.block import set_recompute
from trimtab_runtime.xeon.weights import dequantiser

TYPICAL_ROWS = 2  # of the first packed, which hold the longest samples; other choices are in README.md


class Diverged(TrimtabError):
    """The loss is no longer a number."""


def train(
    job: JobDir, spec: TrainSpec, events: EventLog, say: Callable[[str], None], stop_requested: Callable[[], bool], team: Team = ALONE
) -> str:
    """Train on channel `train` by the spec's method and write the artifact.

    Returns "succeeded", or "stopped" when asked to stop before the end.
    Every machine of a team runs this; each step's rows are shared out, and only the first machine writes what stays.
    Raises SpecError and StagingError for inputs that do not fit, Diverged when the loss is not finite, HostLost for a machine that is.
    """
    began = time.monotonic()
    torch.manual_seed(spec.seed)

    def tell(name: str, choice: Made | None) -> None:
        if choice is not None:
            say(f"{name} {choice.value}: {choice.reason}")
            events.write(Choice(name=name, value=choice.value, reason=choice.reason))

    # the data: rows packed before, each token accounted for
    rows = PackedRows(job.channel("train"))
    prepare.verify(job, spec)
    for line in (f"recipe {spec.recipe}", *rows.ledger.lines()):
        say(line)

    # the model: base frozen (4-bit for qlora) and adapters in fp32; or all of it, kept in fp32
    events.write(Phase(name="load", at=time.time()))
    device = pick_device(os.environ.get(DEVICE_VARIABLE, "xeon"), torch.cuda.device_count(), team.world)
    flags = cpu_flags() if device.value == "cpu" else gpu_flags()
    precision = pick_dtype(spec.dtype, flags)
    config, ranks = read_config(job.channel("model")), team.place.ranks
    there = memory_there(ranks) if device.value == "cpu" else None
    again, why = (0, None) if device.value != "cpu" else recomputed(spec, config, precision.value, rows.facts, there)
    memory = expected_memory(spec, config, precision.value, rows.facts, device.value, ranks, again)
    saved_as = saved_dtype(spec) if spec.method == "full" else None
    compiled = kernels.path() if device.value == "cpu" else None
    nf4 = dequantiser(compiled, kept=keep_large_blocks() == KEPT) if compiled is not None and spec.method == "qlora" else None
    of_cpu = (("kernels", compiled), ("nf4", nf4))
    short = short_of_memory(spec, config, precision.value, rows.facts, there, ranks, again)
    for name, choice in (
        ("device", device), ("dtype", precision), *of_cpu, ("recompute", why), ("peak_memory", memory), ("warning", short),
        ("saved_dtype", saved_as),
    ):  # fmt: skip
        tell(name, choice)
    dtype = getattr(torch, precision.value)
    typical = as_batch([rows[index] for index in range(min(TYPICAL_ROWS, len(rows)))])
    to_write = bytes_to_write(spec, config, job.channel("model")) if team.is_first else None  # of several ranks one keeps NF4
    model = load_model(job.channel("model"), spec, dtype, typical=typical, device=device.value, say=say, to_write=to_write)
    model.train()
    if again:
        set_recompute(model, range(again))
    mixed = dtype is torch.bfloat16 and spec.lora_dropout > 0  # layers with dropout are PEFT's own, in fp32 but for autocast
    trained = trained_parts(model, spec, dtype)
    say(method_line(spec, trained.size, trained.of, precision.value))

    # the optimiser: what is trained, on every machine alike
    parameters = trained.parameters
    team.begin_alike(parameters.values())
    optimizer = torch.optim.AdamW(trained.groups(spec.weight_decay), lr=spec.learning_rate, fused=True)
    rows_per_step = spec.batch_rows * spec.accumulation * team.world
    steps, whole = optimiser_steps(spec, rows.ledger.rounds, team.world)
    say(
        f"steps {steps}: {counted(len(rows), 'row')}, {rows_per_step} a step, {counted(spec.epochs, 'epoch')}"
        + (f", max_steps {spec.max_steps}" if spec.max_steps else "")
    )
    tell("schedule", schedule(spec, steps, rows_per_step))

    # where an earlier life of this run left off
    facts = {"spec": spec.course_digest(), "rows": rows.facts["files"]} | team.counted()
    done = 0
    losses: list[float] = []
    before = 0.0  # seconds that earlier lives spent in the loop
    passed_over: list[str] = []
    found = checkpoint.newest(job.checkpoints, passed_over.append) if team.is_first else None
    for line in passed_over:
        say(line)
        events.write(Choice(name="checkpoint", value=found.name if found else "none", reason=line))
    files = team.files_of_first(checkpoint.read(found) if found else {})
    if files:
        position = checkpoint.load(files, facts, parameters, optimizer)
        done, losses, before = position.step, list(position.losses), position.seconds
        say(f"resume: going on after step {done} from {checkpoint.name(done)}")
    saved, begun_at = done if files else None, done
    if team.is_first:
        artifact.discard(job.model)  # what a life that was killed had written of one
        each, to_come = checkpoint.size(parameters), checkpoint.to_come(spec, done, steps)
        left = artifact.size(spec, trained.size)
        checkpoint.refuse_too_small(job.checkpoints, each, to_come, spec.keep_checkpoints, model=job.model, artifact=left)
    del files  # as large as what is trained and its moments
    trained.write_back()

    def save(reason: str) -> None:
        nonlocal saved
        if not team.is_first:
            return
        if saved != done:  # what is there and whole is not put at risk
            position = checkpoint.Position(done, facts, (*losses[:1], *losses[-1:]), before + time.monotonic() - loop_began)
            checkpoint.save(job.checkpoints, position, parameters, optimizer, keep=spec.keep_checkpoints)
            saved = done
        events.write(Checkpoint(step=done, path=checkpoint.name(done), reason=reason))
        say(f"checkpoint {checkpoint.name(done)}: {reason}")

    def leave(stopping: bool) -> tuple[str, str]:
        """Save before the end; what the end is, and why."""
        if stopping:
            save("asked to stop")
            return "stopped", f"asked to stop after step {done} of {steps}"
        why = f"time limit of {spec.max_minutes:g} minutes after step {done} of {steps}"
        save(why)
        return "succeeded", why

    def time_is_up() -> bool:
        return spec.max_minutes is not None and time.monotonic() - began >= spec.max_minutes * 60

    # the loop
    events.write(Phase(name="train", at=time.time(), detail=counted(steps, "step")))
    saved_at = loop_began = time.monotonic()
    seconds: list[float] = []
    ending, ended_by = "succeeded", ""
    (asked_early,) = team.any(stop_requested())  # while all that was loaded: who asks gives it little time
    if asked_early and done < steps:
        ending, ended_by = leave(stopping=True)
    while done < steps and not ended_by:
        step_began = time.monotonic()
        rate = learning_rate(done, steps, peak=spec.learning_rate, warmup_ratio=spec.warmup_ratio, schedule=spec.lr_schedule)
        for group in optimizer.param_groups:
            group["lr"] = rate
        in_step = rows_of_step(done, rows.ledger.rounds, spec, team.world)
        chosen = in_step[team.rank :: team.world]
        parts = list(chunks(chosen, spec.batch_rows))
        batches = [as_batch([rows[index] for index in part]).to(device.value) for part in parts]
        (targets,) = team.add_up(sum(batch.learned for batch in batches))
        if team.rank:  # the first machine's random numbers go on through its checkpoints; the others' begin anew with each step
            torch.manual_seed(spec.seed + done * team.world + team.rank)
        random = torch.get_rng_state()
        loss, trouble, late, stopping = 0.0, "", False, False
        for turn in range(-(-len(in_step) // (team.world * spec.batch_rows))):  # as many on all machines, whoever has fewer rows
            if turn:  # passes of many long rows outlast the time that who stops a run gives it; a life's first step is finished though late
                late, stopping, troubled = team.any(done > begun_at and time_is_up(), stop_requested(), bool(trouble))
                if late or stopping or troubled:
                    break
            if turn >= len(parts):
                continue
            part, batch = parts[turn], batches[turn]
            with torch.autocast(device.value, torch.bfloat16, enabled=mixed):
                share = batch_loss(model, batch, scale=1 / max(1, targets))
            if not math.isfinite(share.item()):
                trouble = (
                    f"the loss is {share.item()} at step {done + 1}, row {', '.join(map(str, part))}: try a smaller learning_rate "
                    f"(it is {spec.learning_rate:g}), a longer warmup_ratio, or dtype float32"
                )
                continue
            share.backward()
            loss += share.item()
        loss, tokens, troubled = team.add_up(loss, sum(batch.tokens.numel() for batch in batches), bool(trouble))
        if troubled:
            raise Diverged(team.first_word(trouble))
        if late or stopping:  # as if the step had not begun
            optimizer.zero_grad(set_to_none=True)
            torch.set_rng_state(random)
            ending, ended_by = leave(stopping)
            break
        team.add_gradients(parameters.values())
        norm = float(torch.nn.utils.clip_grad_norm_(parameters.values(), spec.max_grad_norm))
        if not math.isfinite(norm):
            raise Diverged(f"the gradient is {norm} at step {done + 1}, rows {in_step}: try a smaller learning_rate, or dtype float32")
        optimizer.step()
        trained.write_back()
        optimizer.zero_grad(set_to_none=True)
        done += 1

        # what the run says of itself
        seconds.append(time.monotonic() - step_began)
        losses.append(loss)
        event = Step(
            step=done, of=steps, epoch=done / whole * spec.epochs, loss=loss, lr=rate, grad_norm=norm,
            tokens_per_second=tokens / seconds[-1],
            seconds_left=statistics.median(seconds[-20:]) * (steps - done),
            memory_mb=peak_memory_mb(device.value),
        )  # fmt: skip
        if team.is_first:
            events.write(event)
            say(event.line())

        # checkpoints: every so many steps, every so many minutes, when stopped, when time is up
        late, stopping = team.any(time_is_up(), stop_requested())
        if (late or stopping) and done < steps:
            ending, ended_by = leave(stopping)
            break
        if done < steps and done % spec.save_every_steps == 0:
            save("every step" if spec.save_every_steps == 1 else f"every {spec.save_every_steps:,} steps")
            saved_at = time.monotonic()
        elif done < steps and time.monotonic() - saved_at >= spec.save_every_minutes * 60:
            save(f"every {spec.save_every_minutes:g} minutes")
            saved_at = time.monotonic()

    # what stays
    if not team.is_first:
        say(f"done: {team.place.hosts[0]} writes the artifact")
        return ending
    events.write(Phase(name="save", at=time.time(), detail=ended_by))
    metrics = {
        "steps": done, "of": steps, "nodes": len(team.place.hosts), "ranks": team.place.ranks,
        "first_loss": losses[0] if losses else None, "last_loss": losses[-1] if losses else None,
        "seconds": round(before + time.monotonic() - loop_began, 1), "ended_by": ended_by or "all steps done",
    }  # fmt: skip
    with disk.whole_or_nothing(job.model, "the artifact", artifact.size(spec, trained.size), lambda: artifact.discard(job.model)):
        artifact.write(job, spec, model, rows.ledger, metrics)
    if spec.keep_merged and ending != "stopped" and not stop_requested():  # who stops a run gives it little time
        events.write(Phase(name="merge", at=time.time()))
        artifact.write_merged(job, spec, say, lambda at, of: events.write(Progress(name="merge", done=at, of=of)))
    say(f"artifact: {job.model}" + (f" ({ended_by})" if ended_by else ""))
    return ending


def bytes_to_write(spec: TrainSpec, config: Mapping[str, Any], base: Path) -> int | None:
    """What a run takes of its disk at most: one checkpoint, of values and moments in fp32, more than it keeps, its artifact, and merged a
    model as large as `base`.

    None for a model whose config.json does not name its sizes.
    """
    model = ModelFacts.from_config(config)
    if model is None:
        return None
    trained = model.trained(spec)
    merged = sum(file.stat().st_size for file in base.glob("*.safetensors")) if spec.keep_merged else 0
    return (spec.keep_checkpoints + 1) * 12 * trained + artifact.size(spec, trained) + merged


def rows_of_step(step: int, rounds: Sequence[int], spec: TrainSpec, nodes: int = 1) -> list[int]:
    """The rows of step `step` (from 0) on all machines: each epoch the next round in a new order, the same wherever a run resumes."""
    epoch = 0
    while step >= (steps := epoch_steps(spec, rounds, epoch, nodes)):
        step, epoch = step - steps, epoch + 1
    turn, in_step = epoch % len(rounds), spec.batch_rows * spec.accumulation * nodes
    order = torch.randperm(rounds[turn], generator=torch.Generator().manual_seed(spec.seed * 1_000_003 + epoch)).tolist()
    return [sum(rounds[:turn]) + row for row in order[step * in_step : (step + 1) * in_step]]


def chunks(items: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
