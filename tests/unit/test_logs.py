"""A training job's log, read from a real CloudWatch Logs service through a network that fails: every line once, in order."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support.faults import Fault, cut_answer, cut_request, hang, lost_answer, refused_json
from support.faulty_proxy import FaultyProxy
from support.log_groups import JOB, NOW, client_at
from trimtab.aws import logs
from trimtab.aws.logs import LogLine, LogReader, next_wait
from trimtab.aws.refusals import is_passing
from trimtab.errors import BackendError

THROTTLED = refused_json(400, "ThrottlingException", "Rate exceeded")
BROKEN = refused_json(500, "ServiceUnavailableException", "not now")


@pytest.fixture
def proxy(localstack: str) -> Iterator[FaultyProxy]:
    with FaultyProxy(localstack) as made:
        yield made


def texts(lines: Any) -> list[str]:
    return [line.text for line in lines]


def watch(reader: LogReader, done: Callable[[], bool], failures: list[BackendError], *, seconds: float = 60.0) -> list[LogLine]:
    """What a watcher gets who polls until `done()`, then reads until nothing comes, and rides out what may pass.

    One last look would not do: where it fails half-way it returns what it has.
    """
    lines: list[LogLine] = []
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        over = done()  # asked before reading: what was written until then is read
        try:
            came = reader.read(eager=over)
        except BackendError as exc:
            if exc.__cause__ is None or not is_passing(exc.__cause__):
                raise
            failures.append(exc)
        else:
            lines += came
            if over and not came:
                return lines
        time.sleep(0.005)
    raise AssertionError(f"not over after {seconds} seconds, with {len(lines)} lines")


def polled(reader: LogReader, *, seconds: float = 30.0) -> list[LogLine]:
    """The next lines that come to a watcher who asks only those streams whose turn it is."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if came := reader.read(eager=False):
            return came
        time.sleep(0.005)
    raise AssertionError(f"no line came in {seconds} seconds")


def test_what_is_not_there_yet_has_no_lines(log_client, log_group, looking_often):
    reader = LogReader(log_client, log_group.name, JOB)
    assert reader.read() == []
    log_group.write("algo-1-1700000000000")
    assert reader.read() == []
    log_group.write("algo-1-1700000000000", "one")
    assert reader.read() == [("algo-1", "one", NOW / 1000)]
    assert reader.read() == []


def test_all_hosts_and_all_their_streams_are_read_and_no_other_jobs(log_client, log_group, looking_often):
    log_group.write("algo-1-1700000000000", (NOW, "a1"), (NOW + 20, "a2"))
    log_group.write("algo-2-1700000000001", (NOW + 10, "b1"))
    log_group.write(f"{JOB}0/algo-1-1", "another job's")
    reader = LogReader(log_client, log_group.name, JOB)
    assert [line[:2] for line in reader.read()] == [("algo-1", "a1"), ("algo-2", "b1"), ("algo-1", "a2")]
    # the machine is taken away in the middle, and its next life has another stream
    log_group.write("algo-1-1700000000000", (NOW + 30, "a3"))
    log_group.write("algo-1-1700000009999", (NOW + 40, "a4"))
    assert [line[:2] for line in reader.read()] == [("algo-1", "a3"), ("algo-1", "a4")]
    log_group.write("algo-10-1700000000002", (NOW + 50, "c1"))
    log_group.write("algo-1-1700000009999", (NOW + 45, "a5"))
    assert [line[:2] for line in reader.read()] == [("algo-1", "a5"), ("algo-10", "c1")]
    assert reader.read() == []


def test_more_streams_than_a_page_of_them(log_client, log_group):
    for number in range(60):
        log_group.write(f"algo-{number}-1700000000000", f"line {number}")
    assert sorted(texts(LogReader(log_client, log_group.name, JOB).read())) == sorted(f"line {number}" for number in range(60))


def test_ten_thousand_lines(log_client, log_group, looking_often):
    written = [f"step={number}/25000" for number in range(25_000)]
    reader, came = LogReader(log_client, log_group.name, JOB), []
    for start in range(0, 25_000, 5_000):
        log_group.write("algo-1-1", *((NOW + number // 7, written[number]) for number in range(start, start + 5_000)))
        if start != 5_000:
            came += texts(reader.read())
    assert came == written
    assert reader.read() == []
    assert texts(LogReader(log_client, log_group.name, JOB).read()) == written
    kept = sum(marks.total() for stream in reader._streams.values() for held in (stream.told, stream.met) for marks in held.values())
    assert kept <= 2 * (logs.OVERLAP_LINES + 7)  # the overlap, not the log


def test_lines_that_arrive_late_behind_newer_ones_are_told_once(log_client, log_group, looking_often):
    reader = LogReader(log_client, log_group.name, JOB)
    log_group.write("algo-1-1", (NOW, "a"), (NOW + 3_000, "c"))
    assert texts(reader.read()) == ["a", "c"]
    log_group.write("algo-1-1", (NOW + 1_000, "b"), (NOW + 4_000, "d"))
    assert texts(reader.read()) == ["b", "d"]
    log_group.write("algo-1-1", (NOW + 500, "late"))
    assert texts(reader.read()) == ["late"]
    assert reader.read() == []


def test_equal_lines_of_one_moment_are_all_told(log_client, log_group, looking_often):
    reader = LogReader(log_client, log_group.name, JOB)
    log_group.write("algo-1-1", "same", "same")
    assert texts(reader.read()) == ["same", "same"]
    log_group.write("algo-1-1", "same")
    assert texts(reader.read()) == ["same"]
    assert reader.read() == []


def test_messages_become_lines_without_ends_and_without_secrets(log_client, log_group):
    token = "hf_" + "aB3" * 12
    key = "-----BEGIN PRIVATE KEY-----\n" + "MIIEvQ" * 12 + "\n-----END PRIVATE KEY-----"
    log_group.write("algo-1-1", "Traceback:\n  File x\nValueError: no", " ", "10%\r", f"HF_TOKEN={token} ok", "naïve 名前\n", key)
    lines = texts(LogReader(log_client, log_group.name, JOB).read())
    assert lines[:5] == ["Traceback:", "  File x", "ValueError: no", " ", "10%"]
    assert lines[5:7] == ["HF_TOKEN=[redacted: Hugging Face token] ok", "naïve 名前"]
    assert "MIIEvQ" not in "".join(lines)


def test_a_machine_that_is_taken_away_is_read_on_by_who_polls(log_client, log_group, looking_often):
    reader = LogReader(log_client, log_group.name, JOB)
    log_group.write("algo-1-1700000000000", "a1")
    log_group.write("algo-2-1700000000001", "b1")
    assert [line[:2] for line in polled(reader)] == [("algo-1", "a1"), ("algo-2", "b1")]
    for life in range(1, 4):
        assert reader.read(eager=False) == []
        log_group.write(f"algo-1-170000000{life}000", f"life {life}")
        assert [line[:2] for line in polled(reader)] == [("algo-1", f"life {life}")]
    log_group.write("algo-2-1700000000001", "b2")  # a stream that was quiet for long
    log_group.write("algo-1-1700000000000", "a2")  # written before the machine went, there after it
    assert sorted(texts(watch(reader, lambda: True, []))) == ["a2", "b2"]


def test_what_was_read_before_an_interruption_is_not_lost(log_client, log_group, looking_often):
    log_group.write("algo-1-1", *[f"a{number}" for number in range(5)])
    log_group.write("algo-2-1", *[f"b{number}" for number in range(5)], at=NOW + 1)
    asked: list[str] = []

    def interrupt(model: Any, **_: Any) -> None:
        asked.append(model.name)
        if model.name == "GetLogEvents" and asked.count("GetLogEvents") == 3:  # behind the first stream's lines
            raise KeyboardInterrupt

    log_client.meta.events.register("before-call", interrupt)
    reader = LogReader(log_client, log_group.name, JOB)
    with pytest.raises(KeyboardInterrupt):
        reader.read()
    assert texts(reader.read()) == [f"a{number}" for number in range(5)] + [f"b{number}" for number in range(5)]
    assert reader.read() == []


FAULTS = {
    "throttling": THROTTLED,
    "500": BROKEN,
    "silence": hang(1.0),
    "connection cut": cut_request(),
    "answer cut": cut_answer(60),
    "answer lost": lost_answer(),
    "a page of a proxy": Fault(200, {"Content-Type": "text/html"}, b"<html>log in</html>"),
}


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("kind", FAULTS)
def test_no_line_is_lost_or_doubled_by_a_failure(proxy, log_group, looking_often, kind, eager):
    log_group.write("algo-1-1", *[f"a{number}" for number in range(5)])
    log_group.write("algo-2-1", *[f"b{number}" for number in range(5)], at=NOW + 1)
    with client_at(proxy.url) as log_client:
        reader = LogReader(log_client, log_group.name, JOB)
        proxy.fault(FAULTS[kind], on="DescribeLogStreams")
        proxy.fault(FAULTS[kind], on="GetLogEvents", times=1, after=2)  # behind the first stream's lines
        with pytest.raises(BackendError, match=f"for the log streams of {JOB}") as error:
            reader.read(eager=eager)
        assert is_passing(error.value.__cause__)
        came = reader.read(eager=eager)
        assert [line.host for line in came] == ["algo-1"] * 5  # what was read before the failure
        came += reader.read(eager=eager)
        assert texts(came) == [f"a{number}" for number in range(5)] + [f"b{number}" for number in range(5)]
        assert reader.read() == []


def test_the_clients_own_retries_hide_a_short_failure(proxy, log_group, looking_often):
    log_group.write("algo-1-1", "one")
    proxy.fault(BROKEN, on="DescribeLogStreams", times=2)
    proxy.fault(THROTTLED, on="GetLogEvents", times=1)
    with client_at(proxy.url, attempts=4) as log_client:
        assert texts(LogReader(log_client, log_group.name, JOB).read()) == ["one"]


def test_a_permission_that_is_missing_is_named(proxy, log_group):
    log_group.write("algo-1-1", "one")
    proxy.fault(refused_json(400, "AccessDeniedException", "no"), on="GetLogEvents", times=9)
    with client_at(proxy.url) as log_client:
        for eager in (True, False):
            with pytest.raises(BackendError, match="logs:GetLogEvents") as error:
                LogReader(log_client, log_group.name, JOB).read(eager=eager)
            assert not is_passing(error.value.__cause__)  # no waiting for what does not pass


def page(token: str, *events: tuple[int, str]) -> Fault:
    listed = [{"timestamp": at, "message": message, "ingestionTime": at} for at, message in events]
    body = json.dumps({"events": listed, "nextForwardToken": token, "nextBackwardToken": "b/0"}).encode()
    return Fault(200, {"Content-Type": "application/x-amz-json-1.1"}, body)


BEGINNING = f"f/{-1:056d}"  # LocalStack's token before the first line


def gap(proxy: FaultyProxy, pages: int) -> None:
    """So many empty pages before the stream's first line."""
    for number in range(pages - 1):
        proxy.fault(page(f"gap {number}"), on="GetLogEvents")
    proxy.fault(page(BEGINNING), on="GetLogEvents")


@pytest.mark.parametrize(("pages", "looks"), [(1, 1), (12, 1), (130, 2)])
def test_an_empty_page_with_another_token_is_not_the_end(proxy, log_group, looking_often, pages, looks):
    log_group.write("algo-1-1", "behind a gap")
    gap(proxy, pages)
    with client_at(proxy.url) as log_client:
        reader = LogReader(log_client, log_group.name, JOB)
        assert [texts(reader.read()) for _ in range(looks)] == [[]] * (looks - 1) + [["behind a gap"]]
        assert reader.read() == []


def test_who_polls_crosses_a_gap_in_several_looks(proxy, log_group, looking_often):
    log_group.write("algo-1-1", "behind a gap")
    gap(proxy, 12)
    with client_at(proxy.url) as log_client:
        tokens: list[str | None] = []

        def note(params: dict[str, Any], model: Any, **_: Any) -> None:
            if model.name == "GetLogEvents":
                tokens.append(params.get("nextToken"))

        log_client.meta.events.register("provide-client-params", note)
        reader = LogReader(log_client, log_group.name, JOB)
        assert reader.read(eager=False) == []
        assert tokens == [None, "gap 0", "gap 1", "gap 2", "gap 3"]
        assert texts(polled(reader)) == ["behind a gap"]
        assert tokens[5:13] == [f"gap {number}" for number in range(4, 11)] + [BEGINNING]  # each look goes on where the last stood
        assert reader.read() == []


def test_a_token_that_has_expired_begins_the_look_anew(proxy, log_group, looking_often):
    log_group.write("algo-1-1", "one", "two")
    with client_at(proxy.url) as log_client:
        reader = LogReader(log_client, log_group.name, JOB)
        proxy.fault(page("old", (NOW, "one")), on="GetLogEvents")
        proxy.fault(BROKEN, on="GetLogEvents")
        assert texts(reader.read()) == ["one"]
        proxy.fault(refused_json(400, "InvalidParameterException", "The specified nextToken is invalid."), on="GetLogEvents")
        assert texts(reader.read()) + texts(reader.read()) == ["two"]


def test_who_waits_asks_seldom(proxy, log_group):
    log_group.write("algo-1-1", "one")
    with client_at(proxy.url) as log_client:
        reader = LogReader(log_client, log_group.name, JOB)
        for _ in range(10):
            reader.read()
    assert proxy.count("DescribeLogStreams") == 1
    assert proxy.count("GetLogEvents") == 2 + 2 + 8  # to the end of the stream, again from where the overlap begins, then one a look


def test_who_polls_asks_only_the_streams_whose_turn_it_is(proxy, log_group, monkeypatch):
    for name in ("LOOK_EVERY", "SHORTEST_WAIT", "LONGEST_WAIT"):
        monkeypatch.setattr(logs, name, 600.0)  # none of it passes in the test
    log_group.write("algo-1-1", "a1")
    log_group.write("algo-2-1", "b1", at=NOW + 1)
    with client_at(proxy.url, attempts=4, silence=30) as log_client:
        reader = LogReader(log_client, log_group.name, JOB)
        assert texts(reader.read(eager=False)) == ["a1", "b1"]
        log_group.write("algo-2-1", "b2", at=NOW + 2)
        assert texts(reader.read(eager=False)) == ["b2"]  # algo-1 said nothing, and rests
        log_group.write("algo-1-1", "a2")
        log_group.write("algo-2-1", "b3", at=NOW + 3)
        assert texts(reader.read(eager=False)) == ["b3"]
        assert reader.read(eager=False) == []  # and so does algo-2
        asked = len(proxy.seen)
        assert [reader.read(eager=False) for _ in range(50)] == [[]] * 50
        assert len(proxy.seen) == asked
        log_group.write("algo-2-1", "b4", at=NOW + 4)
        assert texts(reader.read()) == ["a2", "b4"]
        log_group.write("algo-1-1", "a3")
        assert texts(reader.read(eager=False)) == ["a3"]  # who spoke is asked again at once
    assert proxy.count("DescribeLogStreams") == 1


def test_two_who_watch_see_all_of_a_job_over_a_bad_network(proxy, localstack, log_group, looking_often):
    over, rounds = threading.Event(), 40
    steady = [THROTTLED, BROKEN, cut_request(), cut_answer(40), lost_answer()]

    def job() -> None:
        for number in range(rounds):
            for host in (1, 2):
                life = 1 if number < rounds // 2 else 2  # every machine is taken away once
                log_group.write(
                    f"algo-{host}-170000000000{life}", *[(NOW + 10 * number + step, f"{host}.{number}.{step}") for step in range(5)]
                )
            if number % 4 == 0:
                proxy.fault(steady[number // 4 % len(steady)], on="GetLogEvents" if number % 8 else "DescribeLogStreams")
            time.sleep(0.01)
        over.set()

    writer = threading.Thread(target=job)
    came: dict[str, list[str]] = {}
    failures: dict[str, list[BackendError]] = {"bad": [], "good": []}

    def follow(who: str, url: str) -> None:
        with client_at(url) as log_client:
            lines = watch(LogReader(log_client, log_group.name, JOB), over.is_set, failures[who])
        came[who] = [f"{line.host} {line.text}" for line in lines]

    readers = [threading.Thread(target=follow, args=each) for each in (("bad", proxy.url), ("good", localstack))]
    for thread in (writer, *readers):
        thread.start()
    for thread in (writer, *readers):
        thread.join()
    for who in ("bad", "good"):
        for host in (1, 2):
            mine = [line for line in came[who] if line.startswith(f"algo-{host} ")]
            assert mine == [f"algo-{host} {host}.{number}.{step}" for number in range(rounds) for step in range(5)], who
    assert failures["bad"]


def test_a_network_that_is_away_loses_no_line(proxy, log_group, looking_often):
    log_group.write("algo-1-1", "one")
    with client_at(proxy.url) as log_client:
        reader = LogReader(log_client, log_group.name, JOB)
        assert texts(reader.read(eager=False)) == ["one"]
        proxy.fault(cut_request(), on=lambda seen: True, times=10_000)
        log_group.write("algo-1-1", "two")
        for eager in (False, True, False):
            with pytest.raises(BackendError, match="does not answer") as error:
                reader.read(eager=eager)
            assert is_passing(error.value.__cause__)
        proxy.heal()
        assert texts(reader.read(eager=False)) == ["two"]
        assert reader.read() == []


def test_the_wait_grows_while_nothing_comes_and_falls_back():
    waits = [1.0]
    for _ in range(8):
        waits.append(next_wait(waits[-1], came=False))
    assert waits == sorted(waits)
    assert waits[-1] == 10.0
    assert next_wait(10.0, came=True) == 1.0
    assert all(0.75 * wait <= logs.jittered(wait) <= wait for wait in waits)
