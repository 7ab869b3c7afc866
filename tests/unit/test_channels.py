"""A folder as objects named by content, and those objects as the folder again, as a container finds and unfolds them. No S3."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.job_tree import make_job, run
from trimtab.aws.channels import LARGE, PlannedChannel, plan_channel
from trimtab.aws.place import S3Place, parse_uri
from trimtab.errors import SpecError, StagingError
from trimtab.layout import JobDir
from trimtab_runtime.channels import staged, unfold


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copied(channel: PlannedChannel, folder: Path) -> Path:
    """What SageMaker makes of a channel's manifest: each object as a file under its key's last part."""
    folder.mkdir(parents=True)
    _, *names = json.loads(channel.manifest(S3Place("bucket")))
    contents = {content.name: content for content in channel.objects}
    assert names == list(contents)
    for name, content in contents.items():
        data = content.data if content.data is not None else b"".join(source.path.read_bytes() for source in content.sources)
        assert hashlib.sha256(data).hexdigest() == content.sha256
        assert len(data) == content.size
        (folder / name).write_bytes(data)
    return folder


FILES = {
    "config.json": b"{}",
    "empty": b"",
    "größer/家 x.txt": b"words",
    "a/b/c/deep.bin": bytes(range(256)) * 400,
    "model.safetensors": b"\1" * LARGE,
    "same.safetensors": b"\1" * LARGE,
    "shards/2.safetensors": b"\2" * (LARGE + 7),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path / "folder", FILES)


@pytest.fixture
def channel(folder: Path, tmp_path: Path) -> PlannedChannel:
    return plan_channel(folder, "train", cache=tmp_path / "cache")


def test_a_folder_is_itself_again(channel: PlannedChannel, tmp_path: Path) -> None:
    assert (channel.files, channel.bytes) == (len(FILES), sum(map(len, FILES.values())))
    there = copied(channel, tmp_path / "there")
    assert unfold(there)
    assert tree(there) == FILES
    assert not unfold(there)
    assert tree(there) == FILES


DIES = """
import os, sys
from pathlib import Path
from trimtab_runtime.channels import unfold
left = int(sys.argv[2])
def count(event, arguments):
    global left
    left -= event in ("os.rename", "os.link", "os.remove") or (event == "open" and "w" in str(arguments[1]))
    if left < 0:
        os._exit(9)
sys.addaudithook(count)
unfold(Path(sys.argv[1]))
"""


def test_unfolding_that_was_interrupted_anywhere_is_done_again(channel: PlannedChannel, tmp_path: Path) -> None:
    arrived = copied(channel, tmp_path / "there")
    codes = []
    while 0 not in codes:  # it dies before its first change of the folder, before its second, ...
        there = shutil.copytree(arrived, tmp_path / f"there-{len(codes)}")
        codes.append(subprocess.run([sys.executable, "-c", DIES, there, str(len(codes))], check=False).returncode)
        unfold(there)
        assert tree(there) == FILES
    assert codes == [9] * 10 + [0]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"has \d+ bytes, not|does not hold"),
    ],
)
@pytest.mark.parametrize("which", range(3))
def test_what_did_not_arrive_whole_is_named(
    channel: PlannedChannel, tmp_path: Path, which: int, harm: Callable[[Path], object], said: str
) -> None:
    there = copied(channel, tmp_path / "there")
    objects = sorted((content for content in channel.objects if content.sources), key=lambda content: content.name)
    victim = objects[which]
    harm(there / victim.name)
    with pytest.raises(StagingError, match=f"{victim.name} ({said}).*Start the job again"):
        unfold(there)


def test_bytes_that_changed_on_their_way_are_noticed(channel: PlannedChannel, tmp_path: Path) -> None:
    there = copied(channel, tmp_path / "there")
    bundle = next(content for content in channel.objects if len(content.sources) > 1)
    data = bytearray((there / bundle.name).read_bytes())
    data[-1] ^= 1
    (there / bundle.name).write_bytes(data)
    with pytest.raises(StagingError, match="does not hold"):
        unfold(there)
    index = there / channel.objects[-1].name
    index.write_bytes(index.read_bytes().replace(b"config.json", b"konfig.json"))
    with pytest.raises(StagingError, match="is not what its digest says"):
        unfold(there)


@pytest.mark.parametrize("name", ["../out", "/etc/x", "a//b", "a/./b", "", "a/../../x"])
def test_an_index_cannot_name_a_place_elsewhere(tmp_path: Path, name: str) -> None:
    there = tmp_path / "there"
    data = json.dumps(
        {"format": 1, "files": {}, "bundles": {hashlib.sha256(b"x").hexdigest(): [[name, 1, hashlib.sha256(b"x").hexdigest()]]}}
    )
    fill(there, {hashlib.sha256(b"x").hexdigest(): b"x", f"index-{hashlib.sha256(data.encode()).hexdigest()}": data.encode()})
    with pytest.raises(StagingError, match="which is no file in"):
        unfold(there)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_somebody_is_never_unfolded(channel: PlannedChannel, tmp_path: Path) -> None:
    job = JobDir(tmp_path / "job").make()
    copied(channel, job.channel("train"))
    job.channel("linked").symlink_to(copied(channel, tmp_path / "theirs"))
    fill(job.channel("plain"), {"index-of-things": b"x"})
    assert staged(job) == [job.channel("train")]


def test_the_runtime_unfolds_before_it_reads(tiny_model: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", tiny_model)
    documents = tree(job.channel("documents"))
    for name in ("model", "documents"):
        planned = plan_channel(job.channel(name).resolve(), name, cache=tmp_path / "cache")
        arrived = copied(planned, tmp_path / "arrived" / name)
        if job.channel(name).is_symlink():
            job.channel(name).unlink()
        else:
            shutil.rmtree(job.channel(name))
        arrived.rename(job.channel(name))
    run(job, "prepare")
    assert tree(job.channel("documents")) == documents
    assert tree(job.channel("model")) == tree(tiny_model)
    assert (job.channel("train") / "manifest.json").is_file()


def test_a_channel_that_is_broken_is_the_reason_of_the_run(channel: PlannedChannel, tmp_path: Path, tiny_model: Path) -> None:
    job = make_job(tmp_path / "job", tiny_model)
    copied(channel, job.channel("train"))
    victim = next(path for path in job.channel("train").iterdir() if path.stat().st_size > LARGE)
    victim.unlink()
    run(job, "prepare", expect=1)
    assert job.cause().startswith(f"{victim} is missing, and with it shards/2.safetensors: the channel did not arrive whole. Start the job")


@given(
    st.dictionaries(st.text("abc/é", min_size=1, max_size=8).filter(lambda name: all(name.split("/"))), st.binary(max_size=20), min_size=1)
)
def test_the_digest_is_of_names_and_contents(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]) -> None:
    names = [name for name in files if not any(other.startswith(f"{name}/") for other in files)]
    files = {name: files[name] for name in names}
    one, other = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("other")
    fill(one, files)
    fill(other, dict(reversed(files.items())))
    cache = tmp_path_factory.mktemp("cache")
    assert plan_channel(one, "a", cache=cache).digest == plan_channel(other, "b", cache=cache).digest
    (other / names[0]).write_bytes(files[names[0]] + b"!")
    assert plan_channel(one, "a", cache=cache).digest != plan_channel(other, "b", cache=cache).digest


def test_links_are_followed(folder: Path, channel: PlannedChannel, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in folder.iterdir():
        (linked / path.name).symlink_to(path)
    assert plan_channel(linked, "train", cache=tmp_path / "cache").digest == channel.digest


def test_what_cannot_be_sent_is_refused(folder: Path, tmp_path: Path) -> None:
    def refused(path: Path, match: str) -> None:
        with pytest.raises(StagingError, match=match):
            plan_channel(folder, "train", cache=tmp_path / "cache")
        path.unlink()

    os.mkfifo(folder / "pipe")
    refused(folder / "pipe", "pipe is neither a file nor a folder")
    (folder / "gone").symlink_to(tmp_path / "nothing")
    refused(folder / "gone", "is a link to nothing: remove it")
    (folder / "a" / "up").symlink_to(folder)
    refused(folder / "a" / "up", "is a link to a folder that it is in: remove the link")
    (folder / ("0" * 64)).touch()
    refused(folder / ("0" * 64), "has a name that S3 objects of trimtab have: rename it")
    (folder / "a\nb").touch()
    refused(folder / "a\nb", "control character in its name: rename it")
    (folder / os.fsdecode(b"\xff")).touch()
    refused(folder / os.fsdecode(b"\xff"), "not UTF-8: rename it")
    for nothing in (tmp_path / "absent", folder / "empty"):
        with pytest.raises(StagingError, match="is not a folder: name the folder"):
            plan_channel(nothing, "train", cache=tmp_path / "cache")
    (tmp_path / "bare").mkdir()
    with pytest.raises(StagingError, match="has no file: name the folder"):
        plan_channel(tmp_path / "bare", "train", cache=tmp_path / "cache")


def settle(folder: Path) -> None:
    """Files that were written a while ago, before the manifests among them."""
    for path in folder.rglob("*"):
        moment = path.stat().st_mtime - (50 if path.suffix == ".json" else 100)
        os.utime(path, (moment, moment))


def test_digests_are_noted_and_read_again_when_a_file_changes(folder: Path, channel: PlannedChannel, tmp_path: Path) -> None:
    def read() -> int:
        counts = [0]
        plan_channel(folder, "train", cache=tmp_path / "cache", show=counts.append)
        return counts[-1]

    assert read() == channel.bytes, "files that were just written may change within the same tick of the clock"
    settle(folder)
    assert read() == channel.bytes
    assert read() == 0
    (folder / "config.json").write_bytes(b"{ }")
    assert read() == 3
    (tmp_path / "cache" / "digests").rename(tmp_path / "elsewhere")
    assert read() == channel.bytes + 1
    for note in (tmp_path / "cache" / "digests").iterdir():
        note.write_text('{"files": [1], "bundles": 7')
    assert read() == channel.bytes + 1


@pytest.mark.parametrize(("manifest", "size"), [("manifest.json", "bytes"), ("trimtab-weights.json", "size")])
def test_digests_that_a_manifest_states_are_used_while_it_is_the_newer_one(tmp_path: Path, manifest: str, size: str) -> None:
    folder = fill(tmp_path / "folder", {"model.safetensors": b"\1" * LARGE})
    stated = {"model.safetensors": {size: LARGE, "sha256": "5" * 64}}
    (folder / manifest).write_text(json.dumps({"files": stated}))
    settle(folder)
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "model.safetensors").symlink_to(folder / "model.safetensors")
    assert "5" * 64 in {content.name for content in plan_channel(linked, "model", cache=tmp_path / "cache").objects}
    os.utime(folder / "model.safetensors")
    assert hashlib.sha256(b"\1" * LARGE).hexdigest() in {
        content.name for content in plan_channel(linked, "model", cache=tmp_path / "cache").objects
    }


def test_places_are_checked_before_anything_is_asked() -> None:
    place = S3Place("bucket", "a/b", "123456789012", "alias/mine")
    assert place.content.startswith("a/b/kms-")
    assert place.content.endswith("/content/")
    assert place.content != S3Place("bucket", "a/b", kms_key="alias/other").content
    assert S3Place("bucket").content == "trimtab/content/"
    for wrong in ({"bucket": "s3://bucket"}, {"bucket": "B"}, {"prefix": "/a"}, {"prefix": "a//b"}, {"prefix": "a b"}, {"prefix": ".."}):
        with pytest.raises(SpecError, match=r"is not (a prefix|the name of a bucket): use "):
            S3Place(**{"bucket": "bucket", **wrong})
    with pytest.raises(SpecError, match="give its 12 digits"):
        S3Place("bucket", owner="me")
    assert parse_uri("s3://bucket/a/b/") == ("bucket", "a/b/")
    for uri in ("bucket/a", "https://bucket/a", "s3://bucket", "s3:///a"):
        with pytest.raises(SpecError, match="is not a place in S3: write"):
            parse_uri(uri)
