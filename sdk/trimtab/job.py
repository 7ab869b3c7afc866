"""What a user asks for, checked when it is written down."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from trimtab.backends import check_name, load_backend
from trimtab.backends.base import Backend, Preflight, Priced, Uploading
from trimtab.catalog import lookup
from trimtab.errors import BackendUnavailable, SpecError
from trimtab.estimate import PeakMemory, Rates, dtype_of, peak_memory, recompute_layers
from trimtab.plan import Finding, Foreseen, Plan, Work, measured, memory_here, plan, rates_of, room, steps_time
from trimtab.progress import Display, display
from trimtab.recipes import with_recipe
from trimtab.spec import JobSpec, TrainSpec, refuse_unknown

if TYPE_CHECKING:
    from trimtab.dry_run import DryRun
    from trimtab.run import Run
    from trimtab.staging import Staged

FILLED_IN = {"spec_version", "model_digest", "data_digest"}  # by trimtab itself

OPTIONS = {
    **{name: field for name, field in TrainSpec.model_fields.items() if name not in FILLED_IN},
    **{name: field for name, field in JobSpec.model_fields.items() if name != "train"},
}
"""What a job takes by name, with defaults and help texts: the fields of both specs that are the user's to set."""


class Job:
    """Tune `model` on `data`. Every other option of `TrainSpec` and `JobSpec` may be given by its name; what is not given has the value of
    the `recipe`, else its own default.

    `model` is a catalog alias, a Hub id or a folder; `data` one or more URLs, files, folders and `hf://datasets/...`, or records in memory:
    a list of dictionaries, a `datasets.Dataset`, a data frame; `backend` the place to run, by name
    or as an object with its own settings. A job keeps no state: each `fit` makes a new run.

    Raises SpecError for an unknown name (with the nearest right one) or a value out of range.
    """

    def __init__(self, *, model: str | Path, data: Any, backend: str | Backend = "process", **options: Any) -> None:
        refuse_unknown(options, OPTIONS)
        sources = [data] if isinstance(data, str | Path) else data
        if not isinstance(sources, Sequence) or not all(isinstance(source, str | Path) for source in sources):
            from trimtab.data.given import as_sources  # here: who names sources need not wait for it

            sources = as_sources(sources)
        of_job = {name: options.pop(name) for name in list(options) if name in JobSpec.model_fields}
        train = TrainSpec(model=str(model.expanduser().absolute() if isinstance(model, Path) else model), **with_recipe(options))
        self.spec = JobSpec(train=train, data=tuple(str(source) for source in sources), **of_job)
        self.backend = check_name(backend) if isinstance(backend, str) else backend
        lookup(train.model)

    @overload
    def fit(self, *, wait: bool = True, dry_run: Literal[False] = False, progress: bool = True) -> Run: ...
    @overload
    def fit(self, *, wait: bool = True, dry_run: Literal[True], progress: bool = True) -> DryRun: ...
    @overload
    def fit(self, *, wait: bool = True, dry_run: Literal["render"], progress: bool = True) -> dict[str, Any]: ...
    def fit(self, *, wait: bool = True, dry_run: bool | Literal["render"] = False, progress: bool = True) -> Run | DryRun | dict[str, Any]:
        """Prepare the data, start the run, and wait for its end unless told not to; the run.

        With `dry_run=True` two steps of the very same job are run in its place, waited for and removed, and what the whole job
        would take by them is returned; with "render" nothing is run, and the exact request is returned. The data is prepared for
        both, and found prepared by the fit that follows. `progress` shows what goes on, on the error stream. Ctrl-C ends the
        waiting and not the run, but a dry run altogether.

        Raises any TrimtabError; RunFailed when the run fails while it is waited for.
        """
        from trimtab.run import Run, detach_or_stop

        if dry_run not in (True, False, "render"):
            raise SpecError(f"there is no dry_run={dry_run!r}: True runs two steps, 'render' returns the request")
        run: Run | None = None
        try:
            with display(enabled=progress) as screen:
                backend, staged = self._stage(screen)
                spec = self.spec.model_copy(update={"train": staged.train})
                run_id = f"trim-{uuid.uuid4().hex[:8]}"
                if dry_run == "render":
                    return backend.render(spec, staged.channels, run_id)
                found = self._plan(staged, backend)
                for line in found.reasons:
                    screen.say(line)
                if isinstance(backend, Uploading):
                    backend.upload(spec, staged.channels, screen.show)
                if dry_run:
                    from trimtab.dry_run import try_out

                    return try_out(backend, spec, staged.channels, run_id, found, screen)
                run = Run(backend.submit(spec, staged.channels, run_id), backend)
                screen.say(f"run {run.handle}")
                if wait:
                    run.wait(progress=screen)
                return run
        except KeyboardInterrupt:
            if run is not None:
                detach_or_stop(run)
            elif not dry_run:
                print("Nothing was started. Begin again by repeating the command.", file=sys.stderr)
            raise

    def plan(self, *, dry_run: bool = False, progress: bool = True) -> Plan:
        """What `fit` would do and take: tokens, steps, memory, time, price, what is missing, and the reason for each. The data is
        prepared; nothing is started, and nothing is sent to a place that is paid for, which is asked for permissions and quotas.

        With `dry_run=True` two steps of the job are run first, where it would run (there they are paid for): time and memory are then
        what these took.

        Raises any TrimtabError but a backend's that is not there, which the plan says is missing.
        """
        tried = self.fit(dry_run=True, progress=progress) if dry_run else None
        with display(enabled=progress) as screen:
            backend = load_backend(self.backend) if isinstance(self.backend, str) else self.backend
            lacking = _lacking(backend, self.spec)
            found = self._plan(self._staged(backend, screen), backend, lacking)
        return found if tried is None else measured(found, tried.seconds, tried.memory_mb)

    def _plan(self, staged: Staged, backend: Backend, lacking: Sequence[Finding] | None = None) -> Plan:
        """`lacking` is what the place lacks by its own word; None: it is not asked for anything."""
        spec = self.spec.model_copy(update={"train": staged.train})
        work = Work.read(staged.channels)
        foreseen = backend.foresee(spec, work) if isinstance(backend, Priced) else self._foresee(spec, work, rates_of(staged.channels))
        findings = list(lacking or ())
        if lacking is not None and not findings:
            findings = backend.findings(spec, foreseen) if isinstance(backend, Priced) else room(foreseen.memory, spec.train.sharing())
        found = plan(staged.train, staged.ledger, self.spec.nodes, foreseen=foreseen, findings=findings)
        return replace(found, place=backend.name)

    def _foresee(self, spec: JobSpec, work: Work, rates: Rates | None) -> Foreseen:
        """For this machine, where `rates` are what was measured on it."""
        memory = self._memory(work)
        if memory is None or rates is None or spec.nodes > 1:
            return Foreseen(memory=memory)
        return Foreseen(
            memory=memory, time=steps_time(spec.train, work, rates), reasons=("time of the steps: start and saving come on top",)
        )

    def _memory(self, work: Work) -> PeakMemory | None:
        """An estimate for a run on CPUs like this machine's; None for a GPU, and for a model that does not name its sizes."""
        from trimtab.doctor.look import cpu

        if work.model is None or self.spec.device != "xeon":
            return None
        spec, dtype = self.spec.train, dtype_of(self.spec.train.dtype, cpu().flags)
        again = recompute_layers(spec, work.model, dtype, work.rows, memory_here() // spec.sharing()).layers
        return peak_memory(spec, work.model, dtype, work.rows, again=again)

    def _stage(self, screen: Display) -> tuple[Backend, Staged]:
        backend = load_backend(self.backend) if isinstance(self.backend, str) else self.backend
        if isinstance(backend, Preflight):
            backend.check(self.spec)
        return backend, self._staged(backend, screen)

    def _staged(self, backend: Backend, screen: Display) -> Staged:
        from trimtab.staging import stage

        # a model in S3 is looked at with the account and region that the job will run in
        return stage(
            self.spec,
            say=screen.say,
            show=screen.show,
            aws=getattr(backend, "aws", None),
            bucket_owner=getattr(backend, "bucket_owner", None),
        )

    def __repr__(self) -> str:
        place = self.backend if isinstance(self.backend, str) else self.backend.name
        return f"Job(model={self.spec.train.model!r}, data={list(self.spec.data)!r}, backend={place!r})"


def _lacking(backend: Backend, spec: JobSpec) -> list[Finding]:
    """That the backend cannot run the job now, or nothing. Raises SpecError for a job that it never can."""
    try:
        if isinstance(backend, Preflight):
            backend.check(spec)
    except BackendUnavailable as exc:
        return [Finding(backend.name, False, str(exc))]
    return []
