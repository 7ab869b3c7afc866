"""When an ended job's log counts as read."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta
from typing import Any

from support.log_groups import JOB, NOW, Group
from trimtab.aws import lives
from trimtab.aws.lives import Life, Lives
from trimtab.aws.logs import LogReader
from trimtab.backends.base import RunHandle
from trimtab.events import Finished


def ended_job(log_client: Any, log_group: Group) -> tuple[Lives, Life]:
    """A job that ended half a minute ago, as a machine sees it whose clock is ahead."""
    ended = datetime.now(UTC) - timedelta(seconds=30)
    described = {"TrainingJobStatus": "Completed", "TrainingStartTime": ended - timedelta(seconds=60), "TrainingEndTime": ended}
    run = Lives(None, RunHandle("sagemaker", JOB))
    return run, Life(JOB, LogReader(log_client, log_group.name, JOB), described)


def settle(run: Lives, life: Life) -> float:
    """Read the job's log until it counts as read; the seconds that it took."""
    begun = time.monotonic()
    while not life.settled:
        run._read(life)
        assert time.monotonic() - begun < 30
        time.sleep(0.05)
    return time.monotonic() - begun


def test_lines_after_the_jobs_end_are_waited_for_and_not_for_ever(log_client, log_group, looking_often, monkeypatch):
    monkeypatch.setattr(lives, "SETTLING", 1.0)
    log_group.write("algo-1-1", "one")
    late = threading.Timer(0.4, lambda: log_group.write("algo-1-1", "late"))
    late.start()
    run, life = ended_job(log_client, log_group)
    seconds = settle(run, life)
    late.join()
    assert life.lines == ["one", "late"]
    assert 1.2 < seconds < 10


def test_who_has_the_runs_last_word_waits_for_no_more(log_client, log_group, looking_often):
    last = Finished(state="failed", reason="no", seconds=1.0)
    log_group.write("algo-1-1", last.model_dump_json())
    run, life = ended_job(log_client, log_group)
    run._read(life)
    log_group.write("algo-1-1", (NOW + 1, "Traceback"))  # a failure is printed after the last word
    assert settle(run, life) < lives.SETTLING / 2
    assert life.lines == ["Traceback"]
    assert life.events == [last]
