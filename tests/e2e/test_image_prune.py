"""Pruning, and an engine that dies: in an engine of the test's own, since the images of the other one are not a test's to remove."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.own_engine import OwnEngine
from trimtab import images
from trimtab.cli import main
from trimtab.errors import BackendUnavailable
from trimtab.images import LABEL, Plan, context

pytestmark = [
    pytest.mark.skipif(os.getuid() != 0, reason="only root can start an engine of its own"),
    # the SDK leaves a socket that found no engine, as while one starts and after it died, to the garbage collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def engine(base_image: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[OwnEngine]:
    """`base_image` sees to it that dockerd is installed."""
    own = OwnEngine(Path(tempfile.mkdtemp(prefix="trimtab-", dir="/run")))
    try:
        own.start()
        monkeypatch.setenv("DOCKER_HOST", own.address)
        yield own
    finally:
        own.remove()
        gc.collect()


def make(engine: OwnEngine, content: str, labels: dict[str, str], tag: str | None = None) -> str:
    """An image of one layer of 1 MB with our labels, under the tag that ours have, or another."""
    files = {"Dockerfile": b"FROM scratch\nCOPY content /\n", "content": content.encode() * 1_000_000}
    tag = tag or f"trimtab-xeon-train:{labels['version']}-{labels['context'][:12]}"
    ours = {f"{LABEL}{name}": value for name, value in labels.items()}
    engine.client.images.build(fileobj=context.archive(files), custom_context=True, tag=tag, labels=ours, rm=True, forcerm=True)
    return tag


def test_what_is_not_current_goes_and_what_is_used_stays(engine: OwnEngine, capsys: pytest.CaptureFixture[str]) -> None:
    now = Plan.of("xeon").labels()
    current = make(engine, "c", now)
    old = make(engine, "o", {**now, "version": "0.0.1", "source": "1" * 64, "context": "1" * 64})
    used = make(engine, "u", {**now, "version": "0.0.2", "source": "2" * 64, "context": "2" * 64})
    derived = make(engine, "d", {**now, "source": "3" * 64, "context": "3" * 64}, "team/own:1")
    replaced = engine.client.images.get(make(engine, "r", {**now, "version": "0.0.3", "source": "4" * 64, "context": "4" * 64}))
    engine.client.api.tag(replaced.id, "kept/elsewhere", f"0.0.3-{'4' * 12}")  # as a push leaves it
    make(engine, "R", {**now, "context": "4" * 64, "version": "0.0.3"})
    untagged = engine.client.images.get(make(engine, "x", {**now, "context": "5" * 64}))
    again = make(engine, "y", {**now, "context": "5" * 64})
    engine.client.api.create_container(used, ["/none"], name="user-of-it")
    pushed = f"kept/elsewhere:0.0.3-{'4' * 12}"
    goes = {old, pushed, untagged.id}

    assert main(["image", "list"]) == 0
    assert capsys.readouterr().err.rstrip().endswith("trimtab image prune")
    assert main(["image", "prune", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {one["tag"] for one in found["removed"]} == goes
    assert found["freed"] is None
    before = {image.id for image in engine.client.images.list()}
    assert main(["image", "prune", "--dry-run"]) == 0
    assert "3 to remove" in capsys.readouterr().out
    assert {image.id for image in engine.client.images.list()} == before

    assert main(["image", "prune", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {one["tag"] for one in found["removed"]} == goes
    assert [(one["tag"], one["containers"]) for one in found["in_use"]] == [(used, ["user-of-it"])]
    assert found["freed"] == 3_000_000
    left = {tag for image in engine.client.images.list() for tag in image.tags or [image.id]}
    assert left == {current, used, derived, f"trimtab-xeon-train:0.0.3-{'4' * 12}", again}

    engine.client.api.remove_container("user-of-it")
    assert main(["image", "prune"]) == 0
    assert capsys.readouterr().out == f"removed  {used}  1 MB\n1 removed, 1 MB freed (layers that other images use stay)\n"
    assert main(["image", "prune"]) == 0
    assert capsys.readouterr().out == "nothing to remove\n"
    assert main(["image", "list"]) == 0
    assert capsys.readouterr().err == ""


def test_an_engine_that_dies_after_it_answered(engine: OwnEngine) -> None:
    tag = make(engine, "c", Plan.of("xeon").labels())
    with contextlib.closing(images.engine()) as client:
        image = images.inspect(tag, client)
        engine.kill()
        for question in (
            lambda: images.installed(client),
            lambda: images.inspect(tag, client),
            lambda: images.check(image, client),
            lambda: images.build("xeon", client=client, say=lambda line: None),
            lambda: images.prune(client),
        ):
            with pytest.raises(BackendUnavailable, match=r"does not answer .*: start it .* and try again$"):
                question()
