"""Who is to blame when ranks end, and what each is called; tests/e2e/test_ranks.py runs them."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import click
import pytest

from trimtab.cli_options import NumberOr
from trimtab.errors import SpecError
from trimtab.estimate import ModelFacts, Rates, optimiser_steps, peak_memory, step_seconds
from trimtab.ledger import Account, Ledger
from trimtab.plan import plan, room
from trimtab.spec import JobSpec, TrainSpec
from trimtab_runtime.distributed import HostLost, Place, Team, join, lost_host
from trimtab_runtime.ranks import Ended, RankFailed, Seat, all_ends, follow, verdict
from trimtab_runtime.xeon.placement import Memory, Share

LOST = Ended(0, 1, 0, "lost rank 1: its connection was closed", "trace", echo=True)


def test_the_exit_code_of_ranks_that_ended_well_is_theirs() -> None:
    assert verdict([Ended(1, 0, 0), Ended(0, 0, 0)]) == 0
    assert verdict([Ended(1, 143, 0), Ended(0, 143, 0)]) == 143
    assert verdict([Ended(1, 0, 0), Ended(0, 130, 0)]) == 130


@pytest.mark.parametrize(
    ("ends", "reason"),
    [
        ([Ended(1, -9, 2_000_000_000), LOST], r"^rank 1 was killed by SIGKILL with 2\.0 GB of memory in use: out of memory"),
        ([LOST, Ended(1, -11, 0)], "^rank 1 was killed by SIGSEGV"),
        ([LOST, Ended(1, 1, 0, "no rows", "its trace")], "^rank 1: no rows$"),
        ([Ended(0, 1, 0, "no rows", "its trace"), Ended(1, -9, 0, ended_here=True)], "^no rows$"),
        ([Ended(1, 1, 0, "rank 0 failed: no rows", echo=True), Ended(0, 1, 0, "no rows")], "^no rows$"),
        ([LOST, Ended(1, -9, 0, ended_here=True)], "^lost rank 1"),  # of another machine, say
        ([Ended(1, 1, 0), LOST], "^rank 1 ended with exit code 1 and no word"),
    ],
)
def test_the_one_to_blame_is_named(ends: list[Ended], reason: str) -> None:
    with pytest.raises(RankFailed, match=reason):
        verdict(ends)


def test_the_traceback_is_that_of_the_one_to_blame() -> None:
    with pytest.raises(RankFailed) as failed:
        verdict([LOST, Ended(1, 1, 0, "no rows", "its trace")])
    assert failed.value.trace == "its trace"


def test_a_seat_crosses_as_text(tmp_path: Path) -> None:
    for share in (Share(2, (0, 1), Memory("interleave", (2, 3)), {"OMP_NUM_THREADS": "2"}), Share(None)):
        seat = Seat(1, 2, share, "meet", str(tmp_path / "report"))
        assert Seat.from_text(seat.to_text()) == seat
    seat.tell("why", "where", echo=True)
    assert json.loads((tmp_path / "report").read_text()) == {"cause": "why", "trace": "where", "echo": True}


def test_what_members_are_called() -> None:
    assert Place().members == ("localhost",)
    one = Place(ranks=2, number=1)
    assert (one.members, one.name, one.rank, one.world) == (("rank 0", "rank 1"), "rank 1", 1, 2)
    two = Place("algo-2", ("algo-1", "algo-2"), ranks=2, number=0)
    assert (two.name, two.rank, two.world) == ("algo-2 rank 0", 2, 4)
    assert Team(one).counted() == {"ranks": 2}
    assert Team(two).counted() == {"nodes": 2, "ranks": 2}
    assert Team().counted() == {}
    others = [member for member in two.members if member != two.name]
    problem = "Connection closed by peer [10.0.0.1]:34690"
    assert lost_host(others, {"10.0.0.1": "algo-1", "10.0.0.2": "algo-2"}, problem) == "one of algo-1 rank 0, algo-1 rank 1"
    assert lost_host(others, {"10.0.0.2": "algo-2"}, problem.replace("0.1]", "0.2]")) == "algo-2 rank 1"


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    place = Place(ranks=3, number=1, meet=str(tmp_path / "meet"))
    with pytest.raises(HostLost, match=r"^rank 0, rank 2 did not come within 0\.5 s: see its own log$"):
        join(place, lambda line: None, meeting=0.5)
    assert "GLOO_SOCKET_IFNAME" not in os.environ


@pytest.mark.parametrize("value", [0, -1, 257, True, "two", 1.5, None])
def test_ranks_are_a_number_or_auto(value: object) -> None:
    with pytest.raises(SpecError, match="ranks: is neither auto nor a whole number from 1 to 256"):
        TrainSpec(model="m", ranks=value)


def test_ranks_cross_and_are_counted() -> None:
    spec = TrainSpec(model="m", ranks="auto", epochs=2)
    assert TrainSpec.from_hyperparameters(spec.to_hyperparameters()) == spec
    four = spec.model_copy(update={"ranks": 4})
    assert (spec.sharing(), spec.sharing(2), four.sharing(), four.sharing(2)) == (1, 2, 4, 8)
    assert four.course_digest() == spec.course_digest() == TrainSpec(model="m", epochs=2).course_digest()
    assert optimiser_steps(four, (9,), four.sharing(2)) == (4, 4)
    ledger = Ledger(accounts={"document": Account(samples=9, tokens=90, trained=90)}, rounds=(9,), row_tokens=16)
    assert [plan(one, ledger).steps for one in (spec, four)] == [18, 6]
    assert any(reason.startswith("steps are those of one rank on a machine") for reason in plan(spec, ledger).reasons)
    assert room(None, 4) == []
    model = ModelFacts(layers=2, hidden=64, intermediate=128, heads=4, kv_heads=4, head_width=16, vocabulary=512, tied=True)
    assert [finding.ok for finding in room(peak_memory(four, model, "float32"), 4)] == [True]
    assert not room(peak_memory(four, model, "float32"), 10_000)[0].ok
    rates = Rates.stated("float32", 1e11, 1e10)  # of a machine, which its ranks share
    assert step_seconds(four, model, rates) == pytest.approx(4 * step_seconds(spec, model, rates))


def test_ranks_are_for_processors() -> None:
    with pytest.raises(SpecError, match="leave out --ranks"):
        JobSpec(train=TrainSpec(model="m", ranks=2), data=("a",), device="gpu")


def test_the_option_takes_a_number_or_a_word() -> None:
    kind = NumberOr(["auto"])
    assert (kind.name, kind.convert("4", None, None), kind.convert("auto", None, None)) == ("integer|auto", 4, "auto")
    with pytest.raises(click.BadParameter, match="'many' is neither a whole number nor auto"):
        kind.convert("many", None, None)


def test_what_ranks_print_has_their_number_and_who_hangs_is_ended() -> None:
    """Real processes: the second one fails, the third one would go on for a minute."""
    programs = ["pass", "import sys; print('one', flush=True); sys.stderr.write('two\\n'); sys.exit(3)", "import time; time.sleep(60)"]
    said: list[str] = []
    over: queue.Queue[Ended] = queue.Queue()
    running: dict[int, subprocess.Popen[bytes]] = {}
    for number, program in enumerate(programs):
        out = subprocess.PIPE if number else None
        running[number] = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT)
        seat = Seat(number, 3, Share(None), "meet", "/nonexistent/report")
        threading.Thread(target=follow, args=(seat, running[number], said.append, over), daemon=True).start()
    began = time.monotonic()
    ends = all_ends(over, running, grace=0.5)
    assert time.monotonic() - began < 30
    assert running == {}
    assert sorted(said) == ["[rank 1] one", "[rank 1] two"]
    assert {one.number: (one.code, one.ended_here) for one in ends} == {0: (0, False), 1: (3, False), 2: (-9, True)}
    with pytest.raises(RankFailed, match=r"^rank 1 ended with exit code 3 and no word"):
        verdict(ends)


def test_a_rank_that_ended_while_it_was_to_be_killed_is_still_waited_for(tmp_path: Path) -> None:
    """It has ended, nobody has waited for it yet, and the others' time is up: the kill must leave its end to the thread that follows."""
    over: queue.Queue[Ended] = queue.Queue()
    failed = subprocess.Popen([sys.executable, "-c", "import sys; sys.exit(3)"])
    failed.wait()
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    over.put(Ended(0, 3, 0))
    later = threading.Timer(0.5, follow, (Seat(1, 2, Share(None), "meet", str(tmp_path / "none")), process, str, over))
    later.start()
    ends = all_ends(over, {0: failed, 1: process}, grace=0.1)
    later.join()
    assert [(one.number, one.code, one.ended_here) for one in ends] == [(0, 3, False), (1, 0, True)]
    assert ends[1].peak > 0


@pytest.mark.parametrize("report", [None, "[1]", '{"cause": "why", "new": 1}'])
def test_how_a_rank_ended_is_always_said(tmp_path: Path, report: str | None) -> None:
    if report is not None:
        (tmp_path / "report").write_text(report)
    seat, over = Seat(1, 2, Share(None), "meet", str(tmp_path / "report")), queue.Queue[Ended]()
    waited = subprocess.Popen([sys.executable, "-c", "import sys; sys.exit(4)"])
    waited.wait()  # by somebody else
    follow(seat, waited, str, over)
    assert over.get_nowait() == Ended(1, 4, 0)

    def closed(line: str) -> None:
        raise ValueError("the log is closed")

    talking = subprocess.Popen([sys.executable, "-c", "print(1)"], stdout=subprocess.PIPE)
    with pytest.raises(ValueError, match="the log is closed"):
        follow(seat, talking, closed, over)
    assert over.get_nowait().code == 0


def test_signals_of_a_stop_are_known() -> None:
    from trimtab_runtime.__main__ import STOPS
    from trimtab_runtime.ranks import STOPPED

    assert {128 + number for number in STOPS} == set(STOPPED)
    assert signal.SIGTERM in STOPS
