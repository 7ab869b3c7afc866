"""The process that a container starts: it runs a verb as its child, passes signals on, and ends as the child ends.

As PID 1 it reaps what the child leaves behind. As root it makes the folders that a job writes and gives them and the child to a user
without powers; as any other user it changes nothing. A child that is killed from outside gets a failure file, with the memory it had.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from trimtab.layout import JobDir

USER = 10_001  # user and group that root's child becomes; needs no name in /etc/passwd
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)

_CHOWN, _SETGID, _SETUID = 0, 6, 7  # bits of capabilities(7)


def main(verb: Sequence[str]) -> int:
    """Run `python -m trimtab_runtime <verb>` and return its exit code; 128 and the signal's number when a signal ended it."""
    job = JobDir.from_environment()
    asked: list[int] = []  # signals that came, the child's too
    started: list[int] = []  # the child

    def pass_on(number: int, _: object) -> None:
        asked.append(number)
        for pid in started:
            os.kill(pid, number)

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    user = _user_for(job)
    who = {} if user is None else {"user": user, "group": user, "extra_groups": []}
    child = subprocess.Popen([sys.executable, "-P", "-m", "trimtab_runtime", *verb], start_new_session=True, **who)
    for number in list(asked):  # came before there was a child
        os.kill(child.pid, number)
    started.append(child.pid)
    status, peak = _wait(child.pid)
    started.clear()
    code = os.waitstatus_to_exitcode(status)
    child.returncode = code
    if code >= 0:
        return code
    if -code not in asked:
        _tell(job, killed(verb[0] if verb else "the run", -code, peak))
    return 128 - code


def killed(verb: str, number: int, peak: int) -> str:
    """The reason of a run that a signal ended which nobody asked for. `peak` is its largest resident memory in bytes."""
    name = signal.Signals(number).name
    if number == signal.SIGKILL:
        return (
            f"{verb} was killed by {name} with {peak / 1e9:.1f} GB of memory in use: out of memory. "
            "Give the container more, or lower max_seq_len or batch_rows"
        )
    return f"{verb} was killed by {name} with {peak / 1e9:.1f} GB of memory in use: see the log's last lines"


def _wait(pid: int) -> tuple[int, int]:
    """Reap until the child ends: its wait status and its peak resident memory in bytes."""
    while True:
        ended, status, usage = os.wait4(-1, 0)
        if ended == pid:
            return status, usage.ru_maxrss * 1024


def _user_for(job: JobDir, say: Callable[[str], None] = lambda line: print(f"entrypoint: {line}", flush=True)) -> int | None:
    """The user to drop to, its folders made; None to stay who we are."""
    if os.geteuid() != 0:
        return None
    if not all(_capabilities() >> bit & 1 for bit in (_CHOWN, _SETGID, _SETUID)):
        say("runs as root without CAP_CHOWN, CAP_SETGID and CAP_SETUID, so it stays root")
        return None
    job.make()
    written = [job.root, job.hyperparameters.parent, *(job.root / name for name in ("model", "checkpoints", "output"))]
    refused = [str(path) for path in written if not _give(path, deep=path not in (job.root,))]
    if refused:
        say(f"could not be given to user {USER}: {', '.join(refused)}")
    return USER


def _give(path: Path, *, deep: bool) -> bool:
    """Give a path, and with `deep` all in it, to `USER`; whether that was allowed. Links are given, never followed."""
    try:
        os.chown(path, USER, USER, follow_symlinks=False)
        if deep:
            for folder, folders, files in os.walk(path):
                for name in folders + files:
                    os.chown(Path(folder, name), USER, USER, follow_symlinks=False)
    except OSError:  # a read-only mount, a file system without owners
        return False
    return True


def _capabilities() -> int:
    """This process' effective capabilities, a bit for each."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next((int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")), 0)


def _tell(job: JobDir, reason: str) -> None:
    print(reason, file=sys.stderr, flush=True)
    try:
        if not job.failure.exists():
            job.failure.parent.mkdir(parents=True, exist_ok=True)
            job.failure.write_text(f"{reason}\n", encoding="utf-8")
    except OSError as problem:
        print(f"the failure file cannot be written: {problem}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
