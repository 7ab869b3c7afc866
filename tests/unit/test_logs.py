"""A training job's log, read from a real CloudWatch Logs service through a network that fails: every line once, in order."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
import pytest
from botocore.config import Config
from hypothesis import given
from hypothesis import strategies as st

from support.faulty_proxy import Fault, FaultyProxy, cut_answer, cut_request, hang, lost_answer, refused_json
from trimtab.aws import lives, logs
from trimtab.aws.lives import Life, Lives
from trimtab.aws.logs import LogLine, LogReader, next_wait
from trimtab.aws.refusals import is_passing
from trimtab.aws.session import refuse_page
from trimtab.backends.base import RunHandle
from trimtab.errors import BackendError
from trimtab.events import Finished

JOB = "trim-7f3a9c21"
NOW = int(time.time() * 1000)
THROTTLED = refused_json(400, "ThrottlingException", "Rate exceeded")
BROKEN = refused_json(500, "ServiceUnavailableException", "not now")


@contextlib.contextmanager
def client_at(url: str, *, attempts: int = 1, silence: float = 0.8) -> Iterator[Any]:
    """boto3's client of logs, impatient, so that what the reader itself does about failures is seen."""
    config = Config(retries={"total_max_attempts": attempts, "mode": "standard"}, read_timeout=silence, connect_timeout=2)
    given = {"region_name": "us-east-1", "aws_access_key_id": "test", "aws_secret_access_key": "test", "config": config}
    with contextlib.closing(boto3.client("logs", endpoint_url=url, **given)) as client:
        client.meta.events.register("after-call", refuse_page)  # as every client of `Aws` has it
        yield client


class Group:
    """A log group of the test's own, written to as SageMaker's agent writes: in batches, each stream by itself."""

    def __init__(self, client: Any) -> None:
        self.client, self.name, self.streams = client, f"/test/{uuid.uuid4().hex[:12]}", set[str]()

    def write(self, stream: str, *lines: str | tuple[int, str], at: int = NOW) -> None:
        """Lines into `<job>/<stream>`; a line is a text, written at `at`, or a time in milliseconds and a text."""
        name = stream if "/" in stream else f"{JOB}/{stream}"
        if not self.streams:
            self.client.create_log_group(logGroupName=self.name)
        if name not in self.streams:
            self.client.create_log_stream(logGroupName=self.name, logStreamName=name)
            self.streams.add(name)
        events = [
            {"timestamp": line[0], "message": line[1]} if isinstance(line, tuple) else {"timestamp": at, "message": line} for line in lines
        ]
        if events:
            self.client.put_log_events(logGroupName=self.name, logStreamName=name, logEvents=events)


@pytest.fixture
def client(localstack: str) -> Iterator[Any]:
    with client_at(localstack, attempts=4, silence=30) as made:
        yield made


@pytest.fixture
def group(client: Any) -> Iterator[Group]:
    made = Group(client)
    yield made
    if made.streams:
        client.delete_log_group(logGroupName=made.name)


@pytest.fixture
def proxy(localstack: str) -> Iterator[FaultyProxy]:
    with FaultyProxy(localstack) as made:
        yield made


@pytest.fixture
def looking_often(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in [("LOOK_EVERY", 0.0), ("SHORTEST_WAIT", 0.02), ("LONGEST_WAIT", 0.05)]:
        monkeypatch.setattr(logs, name, seconds)


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


def test_what_is_not_there_yet_has_no_lines(client, group, looking_often):
    reader = LogReader(client, group.name, JOB)
    assert reader.read() == []
    group.write("algo-1-1700000000000")
    assert reader.read() == []
    group.write("algo-1-1700000000000", "one")
    assert reader.read() == [("algo-1", "one", NOW / 1000)]
    assert reader.read() == []


def test_all_hosts_and_all_their_streams_are_read_and_no_other_jobs(client, group, looking_often):
    group.write("algo-1-1700000000000", (NOW, "a1"), (NOW + 20, "a2"))
    group.write("algo-2-1700000000001", (NOW + 10, "b1"))
    group.write(f"{JOB}0/algo-1-1", "another job's")
    reader = LogReader(client, group.name, JOB)
    assert [line[:2] for line in reader.read()] == [("algo-1", "a1"), ("algo-2", "b1"), ("algo-1", "a2")]
    # the machine is taken away in the middle, and its next life has another stream
    group.write("algo-1-1700000000000", (NOW + 30, "a3"))
    group.write("algo-1-1700000009999", (NOW + 40, "a4"))
    assert [line[:2] for line in reader.read()] == [("algo-1", "a3"), ("algo-1", "a4")]
    group.write("algo-10-1700000000002", (NOW + 50, "c1"))
    group.write("algo-1-1700000009999", (NOW + 45, "a5"))
    assert [line[:2] for line in reader.read()] == [("algo-1", "a5"), ("algo-10", "c1")]
    assert reader.read() == []


def test_more_streams_than_a_page_of_them(client, group):
    for number in range(60):
        group.write(f"algo-{number}-1700000000000", f"line {number}")
    assert sorted(texts(LogReader(client, group.name, JOB).read())) == sorted(f"line {number}" for number in range(60))


def test_ten_thousand_lines(client, group, looking_often):
    written = [f"step={number}/25000" for number in range(25_000)]
    reader, came = LogReader(client, group.name, JOB), []
    for start in range(0, 25_000, 5_000):
        group.write("algo-1-1", *((NOW + number // 7, written[number]) for number in range(start, start + 5_000)))
        if start != 5_000:
            came += texts(reader.read())
    assert came == written
    assert reader.read() == []
    assert texts(LogReader(client, group.name, JOB).read()) == written
    kept = sum(marks.total() for stream in reader._streams.values() for held in (stream.told, stream.met) for marks in held.values())
    assert kept <= 2 * (logs.OVERLAP_LINES + 7)  # the overlap, not the log


def test_lines_that_arrive_late_behind_newer_ones_are_told_once(client, group, looking_often):
    reader = LogReader(client, group.name, JOB)
    group.write("algo-1-1", (NOW, "a"), (NOW + 3_000, "c"))
    assert texts(reader.read()) == ["a", "c"]
    group.write("algo-1-1", (NOW + 1_000, "b"), (NOW + 4_000, "d"))
    assert texts(reader.read()) == ["b", "d"]
    group.write("algo-1-1", (NOW + 500, "late"))
    assert texts(reader.read()) == ["late"]
    assert reader.read() == []


def test_equal_lines_of_one_moment_are_all_told(client, group, looking_often):
    reader = LogReader(client, group.name, JOB)
    group.write("algo-1-1", "same", "same")
    assert texts(reader.read()) == ["same", "same"]
    group.write("algo-1-1", "same")
    assert texts(reader.read()) == ["same"]
    assert reader.read() == []


def test_messages_become_lines_without_ends_and_without_secrets(client, group):
    token = "hf_" + "aB3" * 12
    key = "-----BEGIN PRIVATE KEY-----\n" + "MIIEvQ" * 12 + "\n-----END PRIVATE KEY-----"
    group.write("algo-1-1", "Traceback:\n  File x\nValueError: no", " ", "10%\r", f"HF_TOKEN={token} ok", "naïve 名前\n", key)
    lines = texts(LogReader(client, group.name, JOB).read())
    assert lines[:5] == ["Traceback:", "  File x", "ValueError: no", " ", "10%"]
    assert lines[5:7] == ["HF_TOKEN=[redacted: Hugging Face token] ok", "naïve 名前"]
    assert "MIIEvQ" not in "".join(lines)


def test_a_machine_that_is_taken_away_is_read_on_by_who_polls(client, group, looking_often):
    reader = LogReader(client, group.name, JOB)
    group.write("algo-1-1700000000000", "a1")
    group.write("algo-2-1700000000001", "b1")
    assert [line[:2] for line in polled(reader)] == [("algo-1", "a1"), ("algo-2", "b1")]
    for life in range(1, 4):
        assert reader.read(eager=False) == []
        group.write(f"algo-1-170000000{life}000", f"life {life}")
        assert [line[:2] for line in polled(reader)] == [("algo-1", f"life {life}")]
    group.write("algo-2-1700000000001", "b2")  # a stream that was quiet for long
    group.write("algo-1-1700000000000", "a2")  # written before the machine went, there after it
    assert sorted(texts(watch(reader, lambda: True, []))) == ["a2", "b2"]


def test_what_was_read_before_an_interruption_is_not_lost(client, group, looking_often):
    group.write("algo-1-1", *[f"a{number}" for number in range(5)])
    group.write("algo-2-1", *[f"b{number}" for number in range(5)], at=NOW + 1)
    asked: list[str] = []

    def interrupt(model: Any, **_: Any) -> None:
        asked.append(model.name)
        if model.name == "GetLogEvents" and asked.count("GetLogEvents") == 3:  # behind the first stream's lines
            raise KeyboardInterrupt

    client.meta.events.register("before-call", interrupt)
    reader = LogReader(client, group.name, JOB)
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
def test_no_line_is_lost_or_doubled_by_a_failure(proxy, group, looking_often, kind, eager):
    group.write("algo-1-1", *[f"a{number}" for number in range(5)])
    group.write("algo-2-1", *[f"b{number}" for number in range(5)], at=NOW + 1)
    with client_at(proxy.url) as client:
        reader = LogReader(client, group.name, JOB)
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


def test_the_clients_own_retries_hide_a_short_failure(proxy, group, looking_often):
    group.write("algo-1-1", "one")
    proxy.fault(BROKEN, on="DescribeLogStreams", times=2)
    proxy.fault(THROTTLED, on="GetLogEvents", times=1)
    with client_at(proxy.url, attempts=4) as client:
        assert texts(LogReader(client, group.name, JOB).read()) == ["one"]


def test_a_permission_that_is_missing_is_named(proxy, group):
    group.write("algo-1-1", "one")
    proxy.fault(refused_json(400, "AccessDeniedException", "no"), on="GetLogEvents", times=9)
    with client_at(proxy.url) as client:
        for eager in (True, False):
            with pytest.raises(BackendError, match="logs:GetLogEvents") as error:
                LogReader(client, group.name, JOB).read(eager=eager)
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
def test_an_empty_page_with_another_token_is_not_the_end(proxy, group, looking_often, pages, looks):
    group.write("algo-1-1", "behind a gap")
    gap(proxy, pages)
    with client_at(proxy.url) as client:
        reader = LogReader(client, group.name, JOB)
        assert [texts(reader.read()) for _ in range(looks)] == [[]] * (looks - 1) + [["behind a gap"]]
        assert reader.read() == []


def test_who_polls_crosses_a_gap_in_several_looks(proxy, group, looking_often):
    group.write("algo-1-1", "behind a gap")
    gap(proxy, 12)
    with client_at(proxy.url) as client:
        tokens: list[str | None] = []

        def note(params: dict[str, Any], model: Any, **_: Any) -> None:
            if model.name == "GetLogEvents":
                tokens.append(params.get("nextToken"))

        client.meta.events.register("provide-client-params", note)
        reader = LogReader(client, group.name, JOB)
        assert reader.read(eager=False) == []
        assert tokens == [None, "gap 0", "gap 1", "gap 2", "gap 3"]
        assert texts(polled(reader)) == ["behind a gap"]
        assert tokens[5:13] == [f"gap {number}" for number in range(4, 11)] + [BEGINNING]  # each look goes on where the last stood
        assert reader.read() == []


def test_a_token_that_has_expired_begins_the_look_anew(proxy, group, looking_often):
    group.write("algo-1-1", "one", "two")
    with client_at(proxy.url) as client:
        reader = LogReader(client, group.name, JOB)
        proxy.fault(page("old", (NOW, "one")), on="GetLogEvents")
        proxy.fault(BROKEN, on="GetLogEvents")
        assert texts(reader.read()) == ["one"]
        proxy.fault(refused_json(400, "InvalidParameterException", "The specified nextToken is invalid."), on="GetLogEvents")
        assert texts(reader.read()) + texts(reader.read()) == ["two"]


def test_who_waits_asks_seldom(proxy, group):
    group.write("algo-1-1", "one")
    with client_at(proxy.url) as client:
        reader = LogReader(client, group.name, JOB)
        for _ in range(10):
            reader.read()
    assert proxy.count("DescribeLogStreams") == 1
    assert proxy.count("GetLogEvents") == 2 + 2 + 8  # to the end of the stream, again from where the overlap begins, then one a look


def test_who_polls_asks_only_the_streams_whose_turn_it_is(proxy, group, monkeypatch):
    for name in ("LOOK_EVERY", "SHORTEST_WAIT", "LONGEST_WAIT"):
        monkeypatch.setattr(logs, name, 600.0)  # none of it passes in the test
    group.write("algo-1-1", "a1")
    group.write("algo-2-1", "b1", at=NOW + 1)
    with client_at(proxy.url, attempts=4, silence=30) as client:
        reader = LogReader(client, group.name, JOB)
        assert texts(reader.read(eager=False)) == ["a1", "b1"]
        group.write("algo-2-1", "b2", at=NOW + 2)
        assert texts(reader.read(eager=False)) == ["b2"]  # algo-1 said nothing, and rests
        group.write("algo-1-1", "a2")
        group.write("algo-2-1", "b3", at=NOW + 3)
        assert texts(reader.read(eager=False)) == ["b3"]
        assert reader.read(eager=False) == []  # and so does algo-2
        asked = len(proxy.seen)
        assert [reader.read(eager=False) for _ in range(50)] == [[]] * 50
        assert len(proxy.seen) == asked
        group.write("algo-2-1", "b4", at=NOW + 4)
        assert texts(reader.read()) == ["a2", "b4"]
        group.write("algo-1-1", "a3")
        assert texts(reader.read(eager=False)) == ["a3"]  # who spoke is asked again at once
    assert proxy.count("DescribeLogStreams") == 1


def test_two_who_watch_see_all_of_a_job_over_a_bad_network(proxy, localstack, group, looking_often):
    over, rounds = threading.Event(), 40
    steady = [THROTTLED, BROKEN, cut_request(), cut_answer(40), lost_answer()]

    def job() -> None:
        for number in range(rounds):
            for host in (1, 2):
                life = 1 if number < rounds // 2 else 2  # every machine is taken away once
                group.write(
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
        with client_at(url) as client:
            lines = watch(LogReader(client, group.name, JOB), over.is_set, failures[who])
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


def test_a_network_that_is_away_loses_no_line(proxy, group, looking_often):
    group.write("algo-1-1", "one")
    with client_at(proxy.url) as client:
        reader = LogReader(client, group.name, JOB)
        assert texts(reader.read(eager=False)) == ["one"]
        proxy.fault(cut_request(), on=lambda seen: True, times=10_000)
        group.write("algo-1-1", "two")
        for eager in (False, True, False):
            with pytest.raises(BackendError, match="does not answer") as error:
                reader.read(eager=eager)
            assert is_passing(error.value.__cause__)
        proxy.heal()
        assert texts(reader.read(eager=False)) == ["two"]
        assert reader.read() == []


def ended_job(client: Any, group: Group) -> tuple[Lives, Life]:
    """A job that ended half a minute ago, as a machine sees it whose clock is ahead."""
    ended = datetime.now(UTC) - timedelta(seconds=30)
    described = {"TrainingJobStatus": "Completed", "TrainingStartTime": ended - timedelta(seconds=60), "TrainingEndTime": ended}
    run = Lives(None, RunHandle("sagemaker", JOB))
    return run, Life(JOB, LogReader(client, group.name, JOB), described)


def settle(run: Lives, life: Life) -> float:
    """Read the job's log until it counts as read; the seconds that it took."""
    begun = time.monotonic()
    while not life.settled:
        run._read(life)
        assert time.monotonic() - begun < 30
        time.sleep(0.05)
    return time.monotonic() - begun


def test_lines_after_the_jobs_end_are_waited_for_and_not_for_ever(client, group, looking_often, monkeypatch):
    monkeypatch.setattr(lives, "SETTLING", 1.0)
    group.write("algo-1-1", "one")
    late = threading.Timer(0.4, lambda: group.write("algo-1-1", "late"))
    late.start()
    run, life = ended_job(client, group)
    seconds = settle(run, life)
    late.join()
    assert life.lines == ["one", "late"]
    assert 1.2 < seconds < 10


def test_who_has_the_runs_last_word_waits_for_no_more(client, group, looking_often):
    last = Finished(state="failed", reason="no", seconds=1.0)
    group.write("algo-1-1", last.model_dump_json())
    run, life = ended_job(client, group)
    run._read(life)
    group.write("algo-1-1", (NOW + 1, "Traceback"))  # a failure is printed after the last word
    assert settle(run, life) < lives.SETTLING / 2
    assert life.lines == ["Traceback"]
    assert life.events == [last]


def test_the_wait_grows_while_nothing_comes_and_falls_back():
    waits = [1.0]
    for _ in range(8):
        waits.append(next_wait(waits[-1], came=False))
    assert waits == sorted(waits)
    assert waits[-1] == 10.0
    assert next_wait(10.0, came=True) == 1.0
    assert all(0.75 * wait <= logs.jittered(wait) <= wait for wait in waits)


class Service:
    """GetLogEvents of one stream as the API reference describes it: by time, in pages of any size, some empty, tokens as positions."""

    def __init__(self) -> None:
        self.events: list[tuple[int, int, str]] = []  # time, arrival, message

    def arrive(self, at: int, message: str) -> None:
        self.events.append((at, len(self.events), message))

    def look(self, stream: Any, sizes: Callable[[], int]) -> list[tuple[int, str]]:
        stream.begin()
        new, behind = [], (stream.start, -1)
        while left := [event for event in sorted(self.events) if event[:2] > behind and event[0] >= stream.start]:
            some = left[: sizes()]
            new += stream.take([{"timestamp": at, "message": message} for at, _, message in some])
            behind = some[-1][:2] if some else behind
        return new


@given(st.data())
def test_however_lines_arrive_each_is_told_once(data):
    service, stream, told, newest = Service(), logs._Stream("s", "algo-1"), [], 0
    for _ in range(data.draw(st.integers(1, 8))):
        for _ in range(data.draw(st.integers(0, 6))):
            at = max(0, newest + data.draw(st.integers(-logs.OVERLAP_MS, 40_000)))
            service.arrive(at, data.draw(st.sampled_from("abc")))
            newest = max(newest, at)
        sizes = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=5))
        pages = iter(sizes)
        told += service.look(stream, lambda pages=pages: next(pages, 3))
    assert Counter(told) == Counter((at, message) for at, _, message in service.events)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 9))
def test_what_is_kept_stays_small(steps, bound):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "OVERLAP_LINES", bound)
        service, stream, told = Service(), logs._Stream("s", "algo-1"), []
        at = 0
        for number, step in enumerate(steps):
            at += step
            service.arrive(at, str(number))
            told += service.look(stream, lambda: 2)
        assert [int(message) for _, message in told] == list(range(len(steps)))
        largest = max(Counter(event[0] for event in service.events).values())
        assert sum(marks.total() for marks in stream.told.values()) <= bound + largest
