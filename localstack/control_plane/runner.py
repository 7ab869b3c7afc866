"""What running jobs and running endpoints have in common: settings, an engine, S3 and Logs, and threads that one owner ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from control_plane import cloudwatch
from control_plane.container import Engine
from control_plane.objects import Objects, client_of
from control_plane.store import ACCOUNT

GRACE = 120.0  # seconds from SIGTERM to SIGKILL, and of a spot instance's notice (StoppingCondition; EC2 user guide)


@dataclass(frozen=True)
class Settings:
    """How the runners differ from SageMaker where a test wants it to. Times in seconds."""

    grace: float = GRACE
    notice: float = GRACE
    sync_every: float = 1.0
    answer: float = 60.0  # that an endpoint's container has for an answer
    shm_size: str = "1g"
    memory: str | None = None  # a container's limit, such as "512m": SageMaker's is the instance's, none here
    volumes: bool | None = None  # see container.py; None: by whether this process is root
    patience: float = 30.0  # with an engine that does not answer: then its containers count as killed
    root_variable: str = "SM_ML_ROOT"  # names the tree to a process
    port_variable: str = "SAGEMAKER_BIND_TO_PORT"  # names the port to a process that serves

    def engine(self) -> Engine:
        return Engine(shm_size=self.shm_size, memory=self.memory, volumes=self.volumes, patience=self.patience)


@dataclass(eq=False)
class Runner:
    """Runs in containers ("docker"), or as processes of `command` ("process"), for one account in one region.

    `work` is a folder of its own. Raises ValueError for processes without a command.
    """

    aws_url: str
    region: str
    work: Path
    runner: Literal["docker", "process"] = "docker"
    command: Sequence[str] = ()
    settings: Settings = Settings()
    account: str = ACCOUNT

    def __post_init__(self) -> None:
        if self.runner == "process" and not self.command:
            raise ValueError("the process runner needs a command: what the image's ENTRYPOINT would be")
        self.objects = Objects(self.aws_url, self.region, self.account)
        self.logs = client_of("logs", self.aws_url, self.region, self.account)
        self.closing = threading.Event()
        self._threads_lock = threading.Lock()
        self._threads: set[threading.Thread] = set()

    @cached_property
    def engine(self) -> Engine:
        return self.settings.engine()

    def begin(self, work: Callable[[], None], name: str) -> None:
        """Does it in a thread that `close` waits for. One that is closed begins nothing any more."""

        def run() -> None:
            try:
                work()
            finally:
                with self._threads_lock:
                    self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, name=name, daemon=True)
        with self._threads_lock:
            if not self.closing.is_set():
                self._threads.add(thread)
                thread.start()

    def close(self) -> None:
        """Ends everything at once, and waits for that."""
        with self._threads_lock:
            self.closing.set()
            left = list(self._threads)
        for thread in left:
            thread.join()
        self.end_rest()
        self.engine.close()
        self.objects.close()
        self.logs.close()

    def end_rest(self) -> None:
        """What still runs when no thread is at work any more."""


def log_output(output: Iterator[bytes], log: cloudwatch.LogStream, name: str) -> threading.Thread:
    """A thread that writes what an instance prints to its log, until it has ended."""

    def read() -> None:
        for piece in output:
            log.write(piece)

    thread = threading.Thread(target=read, name=f"output {name}", daemon=True)
    thread.start()
    return thread
