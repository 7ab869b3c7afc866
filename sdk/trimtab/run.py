"""One execution of a job, wherever it runs and whoever started it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from trimtab.artifact import Artifact
from trimtab.backends import check_name, load_backend
from trimtab.backends.base import Backend, Merging, Removable, Reporting, Resumable, RunHandle, RunState, RunStatus
from trimtab.errors import BackendError, RunFailed, RunNotFound, SpecError, WaitTimeout
from trimtab.events import Event, Step
from trimtab.ledger import Ledger
from trimtab.progress import Display, Silent

if TYPE_CHECKING:
    from trimtab.endpoint import Endpoint

_LOG_TAIL = 20


class Run:
    """A run by its handle. Everything is asked of the backend each time; only what was shown already is remembered."""

    def __init__(self, handle: RunHandle, backend: Backend) -> None:
        self.handle, self.backend = handle, backend
        self._shown = 0

    @classmethod
    def attach(cls, handle: str | RunHandle, **settings: Any) -> Run:
        """The run of a handle such as `process://trim-7f3a9c21`; `settings` are its backend's, such as a `memory` to resume with.

        Raises RunNotFound for a handle without a run, SpecError for a setting that its backend does not have.
        """
        handle = RunHandle.parse(handle)
        try:
            check_name(handle.backend)
        except SpecError as exc:
            raise RunNotFound(f"no run is called {handle}: {exc}") from exc
        backend = load_backend(handle.backend, settings)
        backend.status(handle)
        return cls(handle, backend)

    def status(self) -> RunStatus:
        """State, reason, progress (0 to 1), seconds left, last step."""
        return self.backend.status(self.handle)

    def wait(self, timeout: float | None = None, *, progress: Display | None = None) -> RunStatus:
        """Wait until the run is done, at most `timeout` seconds, and show its events meanwhile; its last status.

        Waiting again shows what is new; after a resume, what the resumed run says.

        Raises RunFailed with the run's own reason, WaitTimeout, after which the run goes on, and BackendError when the place cannot be
        asked, after which it goes on, too.
        """
        progress = progress or Silent()
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            try:
                status = self.status()
                if isinstance(self.backend, Reporting):
                    events, self._shown = self.backend.events(self.handle, self._shown)
                    for event in events:
                        progress.show(event)
            except RunNotFound:
                raise
            except BackendError as exc:  # what it says to repeat is the watching, not the job
                raise type(exc)(f"{exc}\nThe run goes on without this. Watch it again with:  trimtab logs -f {self.handle}") from exc
            if status.done:
                break
            if deadline is not None and time.monotonic() >= deadline:
                raise WaitTimeout(f"{self.handle} is still {status.state} after {timeout:g} s; it goes on:  trimtab logs -f {self.handle}")
            time.sleep(self.backend.poll_seconds)
        if status.state is RunState.FAILED:
            raise RunFailed(self.handle, status.reason, list(self.logs())[-_LOG_TAIL:])
        return status

    def logs(self, *, follow: bool = False) -> Iterator[str]:
        """The lines the run printed; with `follow` also those to come, until it is done."""
        return self.backend.logs(self.handle, follow=follow)

    def stop(self) -> None:
        """Ask the run to write a checkpoint and end, and wait until it has. Quiet when it is done already."""
        self.backend.stop(self.handle)

    def resume(self) -> Run:
        """Start the same run again; it goes on from its newest complete checkpoint. Raises BackendError for one that need not."""
        if not isinstance(self.backend, Resumable):
            raise BackendError(f"the {self.backend.name} backend cannot resume {self.handle}: run the job again")
        if isinstance(self.backend, Reporting):
            self._shown = self.backend.events(self.handle, self._shown)[1]
        self.backend.resume(self.handle)
        return self

    def remove(self) -> None:
        """Delete the run: log, checkpoints, artifact. Raises BackendError for one that is still running."""
        if not isinstance(self.backend, Removable):
            raise BackendError(f"the {self.backend.name} backend cannot remove {self.handle}: delete it where it ran")
        self.backend.remove(self.handle)

    def events(self) -> list[Event]:
        """What the run has said of itself so far, in order; of every life of a resumed run."""
        return self._reporting().events(self.handle)[0]

    def metrics(self) -> list[Step]:
        """Each step once, in order. A step that a resumed run repeated counts as it was the last time."""
        steps = {event.step: event for event in self.events() if isinstance(event, Step)}
        return [steps[number] for number in sorted(steps)]

    def ledger(self) -> Ledger:
        """The account of every token of the run's data."""
        return self._reporting().ledger(self.handle)

    def artifact(self) -> Artifact:
        """What the run left. Raises BackendError while there is none, StagingError for one that is damaged."""
        found = Artifact(self.backend.artifact(self.handle))
        found.verify()
        return found

    def deploy(self, *, backend: str | None = None, **options: Any) -> Endpoint:
        """Serve what the run left, by default where it ran; the options are those of `trimtab.endpoint.deploy`.

        Raises WeightsError when the base model is not the one that was trained, EndpointError when nothing answers.
        """
        from trimtab.endpoint import deploy

        return deploy(**self.to_deploy(backend, options) | options)

    def to_deploy(self, backend: str | None = None, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The arguments of `trimtab.endpoint.deploy` that say what is served, and where.

        A merged model that the run left where the endpoint can read it is served from there; nothing is fetched for it.
        """
        found: dict[str, Any] = {"backend": backend or self.handle.backend, "title": str(self.handle)}
        alone = (options or {}).get("merge", True) and not (options or {}).get("adapters")
        if alone and found["backend"] == self.handle.backend and isinstance(self.backend, Merging):
            uri = self.backend.merged_uri(self.handle)
            if uri:
                return found | {"model_uri": uri}
        return found | {"artifact": self.artifact()}

    def _reporting(self) -> Reporting:
        if isinstance(self.backend, Reporting):
            return self.backend
        raise BackendError(f"the {self.backend.name} backend does not hand on events; read the log:  trimtab logs {self.handle}")

    def __repr__(self) -> str:
        return f"Run({str(self.handle)!r})"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        """For notebooks: how the run stands and its loss curve; IPython chooses among the media types."""
        from trimtab.notebook import of_run

        return of_run(self)

    def _repr_html_(self) -> str:
        return self._repr_mimebundle_()["text/html"]


def detach_or_stop(run: Run) -> None:
    """After Ctrl-C while a run was watched: ask a person at a terminal whether it goes on or ends, and tell others how to do either.

    Another Ctrl-C, the end of the input and any other answer let it go on.
    """
    if sys.stdin.isatty() and sys.stderr.isatty():
        print(
            f"\n{run.handle}: [d]etach, it goes on, or [s]top it, with a checkpoint and an artifact?  ", end="", file=sys.stderr, flush=True
        )
        try:
            answer = sys.stdin.readline().strip().lower()
        except KeyboardInterrupt:
            answer = ""
        if answer in ("s", "stop"):
            print("stopping it ...", file=sys.stderr)
            run.stop()
            print(f"The run is {run.status().state}. Go on with:  trimtab resume {run.handle}", file=sys.stderr)
            return
    print(f"\nThe run goes on:  trimtab logs -f {run.handle}   or end it:  trimtab stop {run.handle}", file=sys.stderr)
