"""What a user asks for, checked when it is written down."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from trimtab.backends import check_name, load_backend
from trimtab.backends.base import Backend, Preflight, Uploading
from trimtab.catalog import lookup
from trimtab.errors import SpecError
from trimtab.estimate import ModelFacts, PeakMemory, dtype_of, peak_memory
from trimtab.plan import Plan, plan
from trimtab.progress import Display, display
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
    """Tune `model` on `data`. Every other option of `TrainSpec` and `JobSpec` may be given by its name.

    `model` is a catalog alias, a Hub id or a folder; `data` one or more URLs, files and folders; `backend` the place to run, by name
    or as an object with its own settings. A job keeps no state: each `fit` makes a new run.

    Raises SpecError for an unknown name (with the nearest right one) or a value out of range.
    """

    def __init__(
        self, *, model: str | Path, data: str | Path | Sequence[str | Path], backend: str | Backend = "process", **options: Any
    ) -> None:
        refuse_unknown(options, OPTIONS)
        sources = [data] if isinstance(data, str | Path) else list(data)
        of_job = {name: options.pop(name) for name in list(options) if name in JobSpec.model_fields}
        train = TrainSpec(model=str(model.expanduser().absolute() if isinstance(model, Path) else model), **options)
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
                found = self._plan(staged)
                for line in found.reasons:
                    screen.say(line)
                if isinstance(backend, Uploading):
                    backend.upload(staged.channels, screen.show)
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
            raise

    def plan(self, *, progress: bool = True) -> Plan:
        """What `fit` would do: rows, tokens, steps, and why. Prepares the data, starts nothing."""
        with display(enabled=progress) as screen:
            _, staged = self._stage(screen)
            return self._plan(staged)

    def _plan(self, staged: Staged) -> Plan:
        return plan(staged.train, staged.ledger, self.spec.nodes, memory=self._memory(staged))

    def _memory(self, staged: Staged) -> PeakMemory | None:
        """An estimate for a run on CPUs like this machine's; None for a GPU, and for a model that does not name its sizes."""
        from trimtab.doctor.look import cpu

        try:
            model = ModelFacts.from_config(json.loads((staged.model.folder / "config.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None
        if model is None or self.spec.device != "xeon":
            return None
        return peak_memory(staged.train, model, dtype_of(staged.train.dtype, cpu().flags))

    def _stage(self, screen: Display) -> tuple[Backend, Staged]:
        from trimtab.staging import stage

        backend = load_backend(self.backend) if isinstance(self.backend, str) else self.backend
        if isinstance(backend, Preflight):
            backend.check(self.spec)
        return backend, stage(self.spec, say=screen.say, show=screen.show)

    def __repr__(self) -> str:
        place = self.backend if isinstance(self.backend, str) else self.backend.name
        return f"Job(model={self.spec.train.model!r}, data={list(self.spec.data)!r}, backend={place!r})"
