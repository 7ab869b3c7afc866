"""Bases in NF4 kept between runs: the same bits, nothing read of the originals, and no run that ends because of them."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from support.tiny_families import config_of, make_model
from trimtab.spec import TrainSpec
from trimtab_runtime import nf4_cache
from trimtab_runtime.batch import Batch, as_batch
from trimtab_runtime.examples import Sample
from trimtab_runtime.loading import open_base
from trimtab_runtime.methods.qlora import Factors
from trimtab_runtime.rows import PackedRows, write_rows

SPEC = TrainSpec(model="tiny", method="qlora", lora_rank=4, max_seq_len=128, model_digest="1" * 64)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(nf4_cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(nf4_cache, "PAYS_FROM", 0)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), config_of("qwen2"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> PackedRows:
    folder = tmp_path_factory.mktemp("rows")
    tokens = torch.randint(10, 200, (128,), generator=torch.Generator().manual_seed(2)).tolist()
    write_rows(folder, [[Sample("document", tokens, [True] * 128)]], 64, {})
    return PackedRows(folder)


def load(
    model: Path, rows: PackedRows, said: list[str], spec: TrainSpec = SPEC, row: int = 0, to_write: int | None = 0
) -> tuple[Any, dict[str, Factors]]:
    typical: Batch = as_batch([rows[row]])
    found = open_base(model, spec, torch.bfloat16, typical, say=said.append, to_write=to_write)
    assert not isinstance(found, str)
    assert found[1] is not None
    return found[0], found[1]


def refuse_difference(one: tuple[Any, dict[str, Factors]], other: tuple[Any, dict[str, Factors]]) -> None:
    mine, theirs = one[0].state_dict(), other[0].state_dict()
    assert set(mine) == set(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    assert set(one[1]) == set(other[1])
    for name, factors in one[1].items():
        assert all(torch.equal(a, b) for a, b in zip(factors, other[1][name], strict=True))


def from_cache(said: list[str]) -> bool:
    return any(line.startswith("base in NF4 from ") for line in said)


def test_the_second_load_reads_what_the_first_one_made(cache: Path, model: Path, rows: PackedRows, tmp_path: Path) -> None:
    said: list[str] = []
    first = load(model, rows, said)
    assert not from_cache(said)
    assert sorted(path.name.partition("-")[0] for path in cache.iterdir()) == ["lost", "nf4"]
    torch.manual_seed(3)
    second = load(model, rows, said)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(2))
    assert from_cache(said)
    refuse_difference(first, second)
    layer = second[0].model.layers[0].mlp.up_proj
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    assert torch.equal(layer(x), first[0].model.layers[0].mlp.up_proj(x))
    assert layer.weight.quant_state.state2.blocksize == 256
    assert layer.support_avx512bf16_for_cpu is False


def test_bitsandbytes_own_loader_reads_an_entry(cache: Path, model: Path, rows: PackedRows) -> None:
    """The names and types are those of a checkpoint that bitsandbytes wrote."""
    import bitsandbytes as bnb
    from safetensors import safe_open

    base, _ = load(model, rows, [])
    (entry,) = cache.glob("nf4-*")
    with safe_open(entry, "pt") as file:
        names = [name for name in file.keys() if name.startswith("model.layers.1.mlp.down_proj.weight.")]  # noqa: SIM118
        stats = {name.removeprefix("model.layers.1.mlp.down_proj.weight."): file.get_tensor(name) for name in names}
        packed = file.get_tensor("model.layers.1.mlp.down_proj.weight")
    found = bnb.nn.Params4bit.from_prequantized(packed, stats, device="cpu")
    mine = base.model.layers[1].mlp.down_proj.weight
    assert torch.equal(found.data, mine.data)
    dequantise = bnb.functional.dequantize_4bit
    assert torch.equal(dequantise(found.data, found.quant_state), dequantise(mine.data, mine.quant_state))


@pytest.mark.parametrize("kind", ["nf4", "lost"])
@pytest.mark.parametrize("how", ["byte", "header", "short", "empty", "longer", "foreign", "folder"])
def test_a_damaged_entry_is_said_and_made_again(cache: Path, model: Path, rows: PackedRows, kind: str, how: str) -> None:
    first = load(model, rows, [])
    (entry,) = cache.glob(f"{kind}-*")
    whole = entry.read_bytes()
    data = bytearray(whole)
    if how == "byte":
        data[-1000] ^= 1
    elif how == "header":
        data[200] ^= 1
    changed = {"short": whole[:-10], "empty": b"", "longer": whole + b"1", "foreign": b"PK\3\4" + bytes(5000)}.get(how, bytes(data))
    entry.unlink()
    if how == "folder":
        entry.mkdir()
    else:
        entry.write_bytes(changed)
    said: list[str] = []
    second = load(model, rows, said)
    assert not from_cache(said)
    refuse_difference(first, second)
    if how == "folder":  # nothing that a run could replace
        assert any("nothing is kept" in line for line in said)
        return
    assert any(str(entry) in line and "is not used" in line for line in said)
    assert entry.read_bytes() == whole
    said.clear()
    refuse_difference(first, load(model, rows, said))
    assert from_cache(said)


def test_what_would_change_the_contents_is_another_entry(cache: Path, model: Path, rows: PackedRows) -> None:
    def made(spec: TrainSpec = SPEC, row: int = 0) -> tuple[int, int]:
        load(model, rows, [], spec, row)
        return len(list(cache.glob("nf4-*"))), len(list(cache.glob("lost-*")))

    assert made() == (1, 1)
    assert made(row=1) == (1, 2)
    assert made(SPEC.model_copy(update={"lora_rank": 5})) == (1, 3)
    assert made(SPEC.model_copy(update={"lora_targets": ("q_proj",)})) == (1, 4)
    assert made(SPEC.model_copy(update={"lora_init": "zeros"})) == (1, 4)
    assert made(SPEC.model_copy(update={"seed": 7, "learning_rate": 1e-3})) == (1, 4)
    assert made(SPEC.model_copy(update={"model_digest": "2" * 64}))[0] == 2


def test_the_last_used_are_kept(cache: Path, model: Path, rows: PackedRows) -> None:
    for rank in range(1, nf4_cache.KEPT + 3):
        load(model, rows, [], SPEC.model_copy(update={"lora_rank": rank}))
        for number, path in enumerate(sorted(cache.glob("lost-*"), key=lambda path: path.stat().st_mtime)):
            os.utime(path, (number, number))  # all in the past, in this order
        said: list[str] = []
        load(model, rows, said, SPEC.model_copy(update={"lora_rank": 1}))  # which is used each time
        assert from_cache(said)
    assert len(list(cache.glob("lost-*"))) == nf4_cache.KEPT


def test_what_a_dead_writer_left_goes(cache: Path, model: Path, rows: PackedRows) -> None:
    cache.mkdir()
    old, fresh = cache / "nf4-1.safetensors.a.part", cache / "nf4-1.safetensors.b.part"
    for path in (old, fresh):
        path.write_bytes(b"1")
    os.utime(old, (time.time() - 90_000,) * 2)
    load(model, rows, [])
    assert not old.exists()
    assert fresh.exists()  # whose writer may live


@pytest.mark.parametrize("why", ["unset", "no digest", "small"])
def test_without_an_entry_to_be_had_nothing_is_written(
    cache: Path, model: Path, rows: PackedRows, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    spec = SPEC.model_copy(update={"model_digest": ""}) if why == "no digest" else SPEC
    if why == "unset":
        monkeypatch.delenv(nf4_cache.VARIABLE)
    if why == "small":
        monkeypatch.undo()
        monkeypatch.setenv(nf4_cache.VARIABLE, str(cache))
    load(model, rows, [], spec)
    assert not cache.exists()


def test_a_folder_that_cannot_be_written_is_said(cache: Path, model: Path, rows: PackedRows) -> None:
    cache.write_bytes(b"")  # a file where the folder should be
    said: list[str] = []
    load(model, rows, said)
    assert [line for line in said if "nothing is kept in" in line and nf4_cache.VARIABLE in line]


def test_a_full_disk_is_said_and_leaves_nothing(cache: Path, model: Path, rows: PackedRows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4_cache, "_SPARE", 1 << 60)
    said: list[str] = []
    load(model, rows, said)
    (line,) = [line for line in said if "MB free and" in line]
    assert nf4_cache.VARIABLE in line
    assert not list(cache.iterdir())


def test_what_the_run_will_write_itself_keeps_its_room(cache: Path, model: Path, rows: PackedRows) -> None:
    said: list[str] = []
    free = shutil.disk_usage(cache.parent).free
    load(model, rows, said, to_write=free - nf4_cache._SPARE // 2)  # which fits as long as nothing is kept
    assert any("with what this run is to write; nothing is kept" in line for line in said)
    assert not list(cache.iterdir())


def test_who_is_not_to_keep_anything_reads_what_others_kept(cache: Path, model: Path, rows: PackedRows) -> None:
    said: list[str] = []
    first = load(model, rows, said, to_write=None)
    assert not cache.exists()
    load(model, rows, said)
    assert not from_cache(said)
    refuse_difference(first, load(model, rows, said, to_write=None))
    assert from_cache(said)


def test_what_is_more_than_its_share_of_the_disk_is_said(
    cache: Path, model: Path, rows: PackedRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nf4_cache, "_SHARE", 1 << 50)
    said: list[str] = []
    load(model, rows, said)
    assert [line for line in said if "of the disk of" in line and nf4_cache.VARIABLE in line]
    assert not list(cache.iterdir())


def test_all_that_is_kept_takes_no_more_than_its_share(tmp_path: Path) -> None:
    for age, (name, size) in enumerate((("nf4-a", 60), ("lost-a", 10), ("nf4-b", 60), ("lost-b", 10), ("nf4-c", 25), ("lost-c", 5))):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(bytes(size))
        os.utime(path, (age, age))
    (tmp_path / "notes.txt").write_bytes(bytes(500))
    nf4_cache._prune(tmp_path, 100)
    assert {path.stem for path in tmp_path.iterdir()} == {"nf4-b", "lost-b", "nf4-c", "lost-c", "notes"}


def test_the_half_that_was_there_is_not_pushed_out_by_the_new_one(
    cache: Path, model: Path, rows: PackedRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(model, rows, [])
    load(model, rows, [], row=1)
    (weights,) = cache.glob("nf4-*")
    os.utime(weights, (1, 1))
    newest = max(path.stat().st_size for path in cache.glob("lost-*"))
    monkeypatch.setattr(nf4_cache, "_SHARE", shutil.disk_usage(cache).total / (weights.stat().st_size + newest + 1000))
    load(model, rows, [], SPEC.model_copy(update={"lora_targets": ("q_proj",)}))
    assert weights.exists()
    assert weights.stat().st_mtime > 1


def test_a_disk_that_fills_while_it_is_written_leaves_nothing(cache: Path, model: Path, rows: PackedRows) -> None:
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    said: list[str] = []
    try:
        load(model, rows, said)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    assert any("nothing is kept" in line for line in said)
    assert not [path for path in cache.iterdir() if path.stat().st_size > 20_000 or path.name.endswith(".part")]


def test_who_reads_while_others_write_finds_it_whole(cache: Path, model: Path, rows: PackedRows) -> None:
    base, lost = load(model, rows, [])
    entries = {kind: next(cache.glob(f"{kind}-*")) for kind in ("nf4", "lost")}
    packed = dict(nf4_cache._packed(base))
    factors = {f"{name}.lora_{side}": one for name, pair in lost.items() for side, one in zip("BA", pair, strict=True)}

    def write() -> None:
        for _ in range(8):
            nf4_cache._put(entries["nf4"], packed)
            nf4_cache._put(entries["lost"], factors)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        for entry in entries.values():
            assert nf4_cache._read(entry)
    for writer in writers:
        writer.join()
    assert set(cache.iterdir()) == set(entries.values())


def test_the_originals_of_its_layers_are_not_read(cache: Path, model: Path, rows: PackedRows, tmp_path: Path) -> None:
    """A copy of the model whose matrices are all zeros, in files of the same sizes: the entry's weights count."""
    from safetensors.torch import load_file, save_file

    first = load(model, rows, [])
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    zeros = {name: torch.zeros_like(tensor) if "_proj.weight" in name else tensor for name, tensor in tensors.items()}
    save_file(zeros, copy / "model.safetensors", metadata={"format": "pt"})
    said: list[str] = []
    refuse_difference(first, load(copy, rows, said))
    assert from_cache(said)
