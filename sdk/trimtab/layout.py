"""The folder tree of a job: SageMaker's `/opt/ml`, the same in every place a job can run.

Source: "Use Amazon S3 and local paths", Amazon SageMaker AI developer guide (training container folders).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT_VARIABLE = "TRIMTAB_ROOT"
MERGED = "merged"  # the folder of an artifact with the merged model, where a run was asked to leave one
EVENTS_VARIABLE = "TRIMTAB_EVENTS"  # log: events are printed, too, for a place that keeps the log and shows no files
PIPE_VARIABLE = "TRIMTAB_UNTIL_STDIN_CLOSES"  # end with the process that holds the other end of standard input
SERVE_VARIABLE = "TRIMTAB_SERVE"  # how to serve: a ServeSpec as one line of JSON
DEVICE_VARIABLE = "TRIMTAB_DEVICE"  # xeon or gpu: what a run was asked to compute on; the images set their own
NF4_CACHE_VARIABLE = "TRIMTAB_NF4_CACHE"  # a folder in which quantised bases stay between runs; unset: none do


@dataclass(frozen=True)
class JobDir:
    """One job's folders. `root` is `/opt/ml` in a container and a folder of the caller's elsewhere."""

    root: Path

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> JobDir:
        """The tree that `TRIMTAB_ROOT` names, else `/opt/ml`."""
        return cls(Path(environ.get(ROOT_VARIABLE) or "/opt/ml"))

    @property
    def hyperparameters(self) -> Path:
        return self.root / "input" / "config" / "hyperparameters.json"

    @property
    def resources(self) -> Path:
        """Which machines take part, and which of them this is; absent where there is one."""
        return self.root / "input" / "config" / "resourceconfig.json"

    def channel(self, name: str) -> Path:
        """A folder of input data: `documents`, `generated`, `train` or `model`."""
        return self.root / "input" / "data" / name

    @property
    def api_key(self) -> Path:
        """The key that whoever asks an endpoint must send; a file, so that it stands in no environment and no request."""
        return self.root / "input" / "config" / "api_key"

    @property
    def adapters(self) -> Path:
        """Where the artifacts lie that are served beside their base model, each in a folder of its name."""
        return self.channel("adapters")

    @property
    def endpoint(self) -> Path:
        """What a server says of itself once it answers: url, pid, models, engine."""
        return self.root / "output" / "data" / "endpoint.json"

    @property
    def model(self) -> Path:
        """Where the artifact is written, and from where a merged model is served."""
        return self.root / "model"

    @property
    def scratch(self) -> Path:
        """Where TMPDIR is put, on disk: what a server writes while it loads, which can be as large as its model."""
        return self.root / "scratch"

    @property
    def nf4(self) -> Path:
        """Where a container of this machine has the folder of quantised bases; SageMaker has none, and its runs keep none."""
        return self.root / "nf4"

    @property
    def checkpoints(self) -> Path:
        """Synced both ways with S3 on SageMaker, so that a spot job finds them again."""
        return self.root / "checkpoints"

    @property
    def failure(self) -> Path:
        """The cause first, the traceback after; a platform reports the first 1,024 characters."""
        return self.root / "output" / "failure"

    @property
    def events(self) -> Path:
        """What the run says of itself, one JSON line each."""
        return self.root / "output" / "data" / "events.jsonl"

    @property
    def rates(self) -> Path:
        """What this machine does in a second, as `measure` found it."""
        return self.root / "output" / "data" / "rates.json"

    @property
    def preview_asked(self) -> Path:
        """Which row or sample the command `preview` shows."""
        return self.root / "input" / "config" / "preview.json"

    @property
    def preview(self) -> Path:
        """The row or sample, token by token, as `preview` found it."""
        return self.root / "output" / "data" / "preview.json"

    def cause(self) -> str:
        """What the failure file says before its traceback, at most 1,024 characters; empty where there is none."""
        try:
            with self.failure.open(encoding="utf-8", errors="replace") as file:
                return file.read(1024).partition("\nTraceback (most recent call last)")[0].strip()
        except FileNotFoundError:
            return ""

    def make(self) -> JobDir:
        """Create the folders that a job writes to, and its configuration folder."""
        for folder in (self.hyperparameters.parent, self.channel(""), self.model, self.checkpoints, self.events.parent):
            folder.mkdir(parents=True, exist_ok=True)
        return self
