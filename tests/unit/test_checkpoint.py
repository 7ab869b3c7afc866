"""A checkpoint is there whole or not at all, and what it gives back is what went in."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from support.disks import fill
from trimtab.errors import SpecError, StagingError
from trimtab.spec import TrainSpec
from trimtab_runtime import checkpoint, manifest
from trimtab_runtime.checkpoint import Position

FACTS = {"spec": "abc", "rows": {"tokens.npy": {"bytes": 3, "sha256": "d"}}}
KEEP_ALL = 100


class Training:
    """Two parameters, an optimiser with moments, and random steps."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.parameters = {"layer.lora_A": nn.Parameter(torch.randn(3, 4)), "layer.lora_B": nn.Parameter(torch.randn(4, 3))}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=0.1, fused=True)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            sum((parameter * torch.randn_like(parameter)).sum() for parameter in self.parameters.values()).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def save(self, folder: Path, step: int, keep: int = KEEP_ALL) -> Path:
        return checkpoint.save(folder, Position(step, FACTS, (3.5, 1.25), 7.5), self.parameters, self.optimizer, keep=keep)

    def load(self, path: Path) -> Position:
        return checkpoint.load(checkpoint.read(path), FACTS, self.parameters, self.optimizer)

    def tensors(self) -> list[torch.Tensor]:
        moments = [value for parameter in self.parameters.values() for _, value in sorted(self.optimizer.state[parameter].items())]
        return [tensor.detach().clone() for tensor in (*self.parameters.values(), *moments)]


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(some, others, strict=True))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def newest(folder: Path) -> tuple[str | None, list[str]]:
    said: list[str] = []
    found = checkpoint.newest(folder, said.append)
    return found and found.name, said


def test_parameters_moments_and_random_numbers_come_back_bit_for_bit(tmp_path: Path) -> None:
    first = Training()
    first.step(3)
    path = first.save(tmp_path, 3)
    saved = first.tensors()
    first.step(4)
    expected, expected_draw = first.tensors(), torch.rand(5)

    second = Training(seed=99)
    assert second.load(path) == Position(3, FACTS, (3.5, 1.25), 7.5)
    assert equal(second.tensors(), saved)
    second.step(4)
    assert equal(second.tensors(), expected)
    assert torch.equal(torch.rand(5), expected_draw)


def test_the_newest_are_kept_and_no_more(tmp_path: Path) -> None:
    training = Training()
    for step in (2, 9, 10, 11):
        training.step()
        training.save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000010", "step-00000011"]
    assert newest(tmp_path) == ("step-00000011", [])


def damage(path: Path) -> None:
    content = bytearray((path / "parameters.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "parameters.safetensors").write_bytes(content)


def replace(path: Path, old: str, new: str) -> None:
    text = (path / "manifest.json").read_text()
    assert old in text
    (path / "manifest.json").write_text(text.replace(old, new, 1))


def truncate(path: Path, size: int) -> None:
    os.truncate(path, size)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (damage, "step-00000006/parameters.safetensors does not match its digest"),
        (lambda path: (path / "manifest.json").unlink(), "step-00000006 has no manifest.json: it was not finished"),
        (lambda path: (path / "manifest.json").write_text("{"), "step-00000006/manifest.json cannot be read: truncated or changed"),
        (lambda path: (path / "manifest.json").write_text(""), "step-00000006/manifest.json cannot be read: truncated or changed"),
        (lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe"), "step-00000006/manifest.json cannot be read"),
        (lambda path: replace(path, '"bytes"', '"bytex"'), "step-00000006/manifest.json cannot be read"),
        (lambda path: replace(path, "optimizer.safetensors", "optimizer.safetensorz"), "optimizer.safetensorz is missing"),
        (lambda path: (path / "manifest.json").write_text('{"files": {}}'), "does not name state.json, parameters.safetensors, optimizer"),
        (lambda path: truncate(path / "parameters.safetensors", 100), "step-00000006/parameters.safetensors does not match its digest"),
        (lambda path: truncate(path / "optimizer.safetensors", 0), "step-00000006/optimizer.safetensors does not match its digest"),
        (lambda path: (path / "optimizer.safetensors").unlink(), "step-00000006/optimizer.safetensors is missing"),
        (lambda path: (path / "state.json").write_text(""), "step-00000006/state.json does not match its digest"),
    ],
)
def test_one_that_is_not_whole_is_named_and_passed_over(tmp_path: Path, harm: Callable[[Path], None], reason: str) -> None:
    training = Training()
    training.step()
    training.save(tmp_path, 3)
    harm(training.save(tmp_path, 6))
    found, said = newest(tmp_path)
    assert found == "step-00000003"
    assert len(said) == 1
    assert reason in said[0]


def test_where_nothing_is_whole_nothing_is_found(tmp_path: Path) -> None:
    assert newest(tmp_path) == (None, [])
    (tmp_path / "step-00000001").mkdir()
    assert newest(tmp_path)[0] is None


def test_where_all_that_were_finished_are_damaged_nothing_begins_again_by_itself(tmp_path: Path) -> None:
    training = Training()
    training.step()
    for step in (3, 6):
        damage(training.save(tmp_path, step))
    (tmp_path / "step-00000009").mkdir()
    said: list[str] = []
    with pytest.raises(
        StagingError, match=r"step-00000006/parameters.safetensors does not match.*step-00000003.*rm -r .*/step-\*  and then"
    ) as caught:
        checkpoint.newest(tmp_path, said.append)
    assert "step-00000009" not in str(caught.value)
    assert len(said) == 3
    shutil.rmtree(tmp_path / "step-00000003")
    shutil.rmtree(tmp_path / "step-00000006")
    assert newest(tmp_path)[0] is None  # what was never finished holds nothing up


def test_an_older_one_that_is_cut_short_is_not_counted_as_kept(tmp_path: Path) -> None:
    training = Training()
    training.step()
    for step in (3, 6, 9):
        training.save(tmp_path, step, keep=3)
    truncate(tmp_path / "step-00000006" / "optimizer.safetensors", 10)
    training.save(tmp_path, 12, keep=3)
    assert names(tmp_path) == ["step-00000003", "step-00000009", "step-00000012"]


@pytest.mark.parametrize("size", [0, 8_192])
def test_a_full_disk_leaves_the_one_before_and_no_half_of_the_new_one(small_disk: Path, size: int) -> None:
    training = Training()
    training.step()
    training.save(small_disk, 3)
    fill(small_disk, leave=size)
    for _ in range(2):
        with pytest.raises(
            StagingError, match=r"^the checkpoint of step 6 could not be written, the disk is full: it takes 0\.0 MB, and "
        ) as caught:
            training.save(small_disk, 6, keep=1)
        assert f"free in {small_disk}. See  df -h {small_disk}  and make room, then  trimtab resume RUN" in str(caught.value)
        assert newest(small_disk) == ("step-00000003", [])
        assert names(small_disk) == ["ballast", "step-00000003"]
    (small_disk / "ballast").unlink()
    training.save(small_disk, 6, keep=1)
    assert names(small_disk) == ["step-00000006"]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_one_does_not_push_out_a_whole_one(tmp_path: Path, keep: int) -> None:
    training = Training()
    training.step()
    training.save(tmp_path, 3)
    for step in (9, 12):
        damage(training.save(tmp_path, step))
    shutil.copytree(tmp_path / "step-00000003", tmp_path / "step-00000001", ignore=shutil.ignore_patterns(manifest.NAME))
    training.save(tmp_path, 6, keep=keep)
    assert names(tmp_path) == ["step-00000003", "step-00000006"][-keep:]
    assert newest(tmp_path) == ("step-00000006", [])


def test_the_same_step_again_takes_the_place_of_what_lay_there(tmp_path: Path) -> None:
    training = Training()
    training.step()
    damage(training.save(tmp_path, 4))
    training.save(tmp_path, 4)
    assert newest(tmp_path) == ("step-00000004", [])


def test_one_of_another_job_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    training = Training()
    training.step()
    path = training.save(tmp_path, 1)
    training.step()
    before = training.tensors()
    with pytest.raises(SpecError, match=r"another job \(spec differs\): start a new run"):
        checkpoint.load(checkpoint.read(path), {**FACTS, "spec": "xyz"}, training.parameters, training.optimizer)
    assert equal(training.tensors(), before)


@pytest.mark.parametrize(
    ("stored", "here", "said"),
    [
        (
            {"ranks": 4},
            {},
            r"with --ranks 4, and this run has --ranks 1, .*: go on with --ranks 4 \(--ranks auto counts .*or start a new run$",
        ),
        ({}, {"nodes": 2}, "with --nodes 1, and this run has --nodes 2, .*: go on with --nodes 1, or start a new run$"),
        ({"nodes": 2, "ranks": 4}, {"nodes": 3, "ranks": 4}, "with --nodes 2, and this run has --nodes 3,"),
        ({"ranks": 2}, {"ranks": 4, "spec": "xyz"}, r"another job \(spec, ranks differs\)"),
    ],
)
def test_another_number_of_ranks_or_nodes_is_named(tmp_path: Path, stored: dict[str, int], here: dict[str, Any], said: str) -> None:
    training = Training()
    training.step()
    position = checkpoint.Position(1, {**FACTS, **stored}, (1.0,))
    path = checkpoint.save(tmp_path, position, training.parameters, training.optimizer, keep=1)
    with pytest.raises(SpecError, match=said):
        checkpoint.load(checkpoint.read(path), {**FACTS, **here}, training.parameters, training.optimizer)


@pytest.mark.parametrize(
    ("options", "done", "expected"),
    [
        ({}, 0, 2),  # after 50 and 100 steps; that after 150 is the end, and no checkpoint
        ({}, 50, 1),
        ({}, 149, 1),  # it can still be asked to stop
        ({}, 150, 0),
        ({"max_minutes": 5}, 0, 1),
        ({"save_every_steps": 1}, 140, 9),
    ],
)
def test_so_many_checkpoints_are_sure_to_come(options: dict[str, float], done: int, expected: int) -> None:
    assert checkpoint.to_come(TrainSpec(model="m", **options), done, 150) == expected


@pytest.mark.parametrize(
    ("there", "to_come", "keep", "more", "at_end"),
    [
        (0, 0, 2, 0, 0),
        (0, 1, 2, 1, 1),
        (0, 9, 2, 3, 2),
        (1, 9, 2, 2, 1),
        (2, 9, 2, 1, 0),
        (4, 9, 1, 1, 0),
        (2, 0, 2, 0, 0),
        (1, 1, 5, 1, 1),
    ],
)
def test_so_many_lie_there_at_once(there: int, to_come: int, keep: int, more: int, at_end: int) -> None:
    assert checkpoint.at_once(there, to_come, keep) == (more, at_end)


def test_a_disk_too_small_for_all_that_is_kept_is_told_at_the_start(tmp_path: Path) -> None:
    """What is there already counts, whole ones as some of those that are kept, and half-written ones as room to come."""
    folder, model = tmp_path / "checkpoints", tmp_path / "model"
    folder.mkdir()
    model.mkdir()
    found = os.statvfs(folder)
    free = found.f_bfree * found.f_frsize

    def check(to_come: int, keep: int, *, each: float = 0.4, artifact: float = 0.0) -> None:
        checkpoint.refuse_too_small(folder, int(free * each), to_come, keep, model=model, artifact=int(free * artifact))

    check(2, 1)
    check(9, 1, artifact=0.3)  # only one is left beside it
    check(0, 9, each=2.0)
    with pytest.raises(StagingError, match=r"^a checkpoint will not fit: it takes "):
        check(1, 1, each=2.0)
    with pytest.raises(StagingError, match=r"^the artifact will not fit: it takes "):
        check(1, 1, artifact=2.0)
    with pytest.raises(StagingError, match=r"^what is kept at once \(checkpoints, 3 more of [\d,.]+ MB\) will not fit: .*resume RUN"):
        check(9, 2)
    with pytest.raises(StagingError, match=r"^what is kept at once \(checkpoints, 2 more of [\d,.]+ MB, the artifact [\d,.]+ MB\)"):
        check(2, 2, artifact=0.4)
    Training().save(folder, 3)
    check(9, 2)
    (folder / "step-00000009").mkdir()
    with (folder / "step-00000009" / "parameters.safetensors").open("wb") as file:
        file.truncate(int(free * 0.8))  # as if it took so much
    with pytest.raises(StagingError, match="what is kept at once"):
        check(9, 5)
    check(9, 4)
