"""A run's record in S3: made once, told apart from another's, and nothing but the run's own removed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.bucket_of_files import Staging, staging
from support.faults import lost_answer, refused, slow_down
from trimtab.aws import records
from trimtab.errors import BackendError

KEY = "t/runs/trim-1/run.json"


@pytest.fixture
def s3(localstack: str, tmp_path: Path) -> Iterator[Staging]:
    with staging(localstack, tmp_path) as found:
        yield found


def test_a_record_is_made_once(s3: Staging) -> None:
    assert records.make(s3.s3, s3.place, KEY, {"created": "now", "by": "größe"})
    assert not records.make(s3.s3, s3.place, KEY, {"created": "later"})
    assert records.read(s3.s3, s3.place, KEY) == {"created": "now", "by": "größe"}
    assert records.exists(s3.s3, s3.place, KEY)
    records.remove(s3.s3, s3.place, KEY)
    assert not records.exists(s3.s3, s3.place, KEY)


def test_a_record_whose_answer_was_lost_is_ours(s3: Staging) -> None:
    s3.proxy.fault(lost_answer(), on="PutObject")
    assert records.make(s3.s3, s3.place, KEY, {"created": "now"})
    assert [one.status for one in s3.proxy.seen if one.operation == "PutObject"] == [200, 412], "boto3 repeats it, and is refused"
    s3.proxy.fault(lost_answer(), on="PutObject")
    assert not records.make(s3.s3, s3.place, KEY, {"created": "by another"})


def test_a_record_that_another_request_is_making_is_waited_for(s3: Staging) -> None:
    conflict = refused(409, "ConditionalRequestConflict", "The conditional request cannot succeed due to a conflicting operation.")
    s3.proxy.fault(conflict, on="PutObject", times=2)
    s3.proxy.fault(slow_down(), on="PutObject", times=2)
    assert records.make(s3.s3, s3.place, KEY, {"created": "now"})
    s3.proxy.fault(conflict, on="PutObject", times=99)
    with pytest.raises(BackendError, match="ConditionalRequestConflict"):
        records.make(s3.s3, s3.place, "t/runs/trim-2/run.json", {"created": "now"})


def test_nothing_but_a_run_is_deleted(s3: Staging) -> None:
    keys = {KEY, "t/runs/trim-1/output/model/x", "t/runs/trim-10/run.json", "t/content/a", "other"}
    for key in keys:
        s3.direct.put_object(Bucket=s3.place.bucket, Key=key, Body=b"{}")
    for prefix in ("", "/", "t/", "t/runs/", "t/runs/trim-1", "t/runs/trim-1/output/", "runs//"):
        with pytest.raises(BackendError, match="is no place of a run, and nothing was deleted there: look at it with"):
            records.delete(s3.s3, s3.place, prefix)
    assert s3.objects().keys() == keys
    records.delete(s3.s3, s3.place, "t/runs/trim-1/")
    assert s3.objects().keys() == keys - {KEY, "t/runs/trim-1/output/model/x"}
