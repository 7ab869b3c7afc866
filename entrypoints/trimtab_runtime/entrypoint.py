"""The process that a container starts: it runs a verb as its child, passes signals on, and ends as the child ends.

As PID 1 it reaps what the child leaves behind. As root it makes the folders that a job writes to, gives them to a user without powers and
starts the child as that user; as any other user it changes nothing. A server writes only to `output` and `scratch`, so there its model
stays whose it is. A child that something killed gets a failure file, with its memory.
"""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from trimtab.layout import JobDir
from trimtab_runtime.channels import staged

USER = 10_001  # user and group that root's child becomes; it needs no name in /etc/passwd
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)

_CHOWN, _SETGID, _SETUID = 0, 6, 7  # bits of capabilities(7)


def main(arguments: Sequence[str]) -> int:
    """Run `python -m trimtab_runtime <arguments>` and return its exit code; 128 and the signal's number when a signal ended it."""
    job = JobDir.from_environment()
    user = user_for(job, serving=list(arguments) == ["serve"])
    return run([sys.executable, "-P", "-m", "trimtab_runtime", *arguments], job, user)


def run(command: Sequence[str], job: JobDir, user: int | None = None) -> int:
    """Run a command as `user` (None: as we are) and return its exit code, as `main` does. Signals that come are the command's, too."""
    asked: list[int] = []
    living: list[int] = []

    def pass_on(number: int, _: object) -> None:
        asked.append(number)
        for pid in living:
            os.kill(pid, number)

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    others = None if user is None else ()
    # in a session of its own a terminal's Ctrl-C reaches it through us, once
    child = subprocess.Popen(command, start_new_session=True, user=user, group=user, extra_groups=others)
    living.append(child.pid)
    for early in asked:  # came before there was a child
        os.kill(child.pid, early)
    status, peak = _reap_until(child.pid)
    living.clear()
    child.returncode = code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return code
    if -code not in asked:
        _tell(job, killed(-code, peak), user)
    return 128 - code


def killed(number: int, peak: int, who: str = "the run") -> str:
    """The reason of a run that a signal ended without anyone asking for it. `peak` is its largest resident memory in bytes."""
    said = f"{who} was killed by {signal.Signals(number).name} with {peak / 1e9:.1f} GB of memory in use"
    if number == signal.SIGKILL:
        return f"{said}: out of memory. Give it more, or lower max_seq_len or batch_rows (of a server cache_gb or max_running)"
    return f"{said}: see the last lines of its log"


def _reap_until(pid: int) -> tuple[int, int]:
    """Reap whatever ends until the child does: its wait status and its peak resident memory in bytes."""
    while True:
        ended, status, usage = os.wait4(-1, 0)
        if ended == pid:
            return status, usage.ru_maxrss * 1024


def user_for(
    job: JobDir, *, serving: bool, say: Callable[[str], None] = lambda line: print(f"entrypoint: {line}", flush=True)
) -> int | None:
    """The user to become, the folders that it writes to made and given to it; None to stay who we are."""
    if os.geteuid() != 0:
        return None
    if not all(_capabilities() >> bit & 1 for bit in (_CHOWN, _SETGID, _SETUID)):
        say("root without CAP_CHOWN, CAP_SETGID and CAP_SETUID cannot become another user, and stays root")
        return None
    output = job.root / "output"
    try:
        if serving:
            job.endpoint.parent.mkdir(parents=True, exist_ok=True)
        else:
            job.make()
    except OSError as problem:
        say(f"{problem}: is {job.root} writable?")
    closed = _closed(job.root / "input")
    if serving:  # what it reads may be somebody's own, or a mount that nobody writes to
        if unreadable := _give([*closed, *_closed(job.model)], deep=False):
            say(f"stays root: user {USER} could not read {', '.join(unreadable)}")
            return None
        refused = _give((path for path in (output, job.scratch) if path.exists()), deep=True)
    else:
        whole = [job.model, job.checkpoints, output, job.hyperparameters.parent, *staged(job)]
        single = [job.root, *(path for path in job.root.glob("*") if path.is_file()), *closed]
        refused = _give(single, deep=False) + _give(whole, deep=True)
    if refused:
        say(f"could not be given to user {USER}: {', '.join(refused)}")
    return USER


def _closed(folder: Path) -> Iterator[Path]:
    """What lies in a folder and others may not read, such as channels that root made for itself."""
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        if not (stat.S_ISLNK(mode) or (mode & stat.S_IROTH and (mode & stat.S_IXOTH or not stat.S_ISDIR(mode)))):
            yield path


def _give(paths: Iterable[Path], *, deep: bool) -> list[str]:
    """Give paths, and with `deep` all that is in them, to `USER`; those of which that was refused. Links are given, not followed."""
    refused = []
    for path in paths:
        try:
            os.chown(path, USER, USER, follow_symlinks=False)
            for folder, folders, files in os.walk(path) if deep else ():
                for name in folders + files:
                    os.chown(Path(folder, name), USER, USER, follow_symlinks=False)
        except OSError as problem:  # not there, a read-only mount, a file system without owners
            refused.append(f"{path} ({problem.strerror})")
    return refused


def _capabilities() -> int:
    """This process' effective capabilities, a bit for each."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next((int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")), 0)


def _tell(job: JobDir, reason: str, user: int | None) -> None:
    """Say why on the log and, where the run left no reason of its own, in the failure file."""
    print(reason, file=sys.stderr, flush=True)
    try:
        if not job.failure.exists():
            job.failure.parent.mkdir(parents=True, exist_ok=True)
            job.failure.write_text(f"{reason}\n", encoding="utf-8")
            if user is not None:
                os.chown(job.failure, user, user)
    except OSError as problem:
        print(f"the failure file cannot be written: {problem}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
