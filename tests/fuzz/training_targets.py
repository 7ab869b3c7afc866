"""What a run is made of: specs, records, conversations, rows. Any input is right or refused, and no token is lost."""

from __future__ import annotations

import contextlib
import functools
import gzip
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fuzz.running import Target
from fuzz.wire_targets import JSON
from support.tiny_model import SPECIAL, make_tokenizer
from trimtab.data.examples import Writer, collect
from trimtab.data.parts import Part
from trimtab.errors import DataError, SpecError, StagingError
from trimtab.ledger import Ledger
from trimtab.spec import JobSpec, TrainSpec
from trimtab_runtime import manifest
from trimtab_runtime.examples import Sample
from trimtab_runtime.objectives import example_samples, read_examples
from trimtab_runtime.packing import alike, pack, split
from trimtab_runtime.prepare import read_records
from trimtab_runtime.rows import PackedRows, write_rows
from trimtab_runtime.tokenizer import Tokenizer


def samples_are_packed_once_and_no_row_is_over(given: tuple[list[int], int]) -> None:
    lengths, row_tokens = given
    pieces = [len(part) for length in lengths for part in split(length, row_tokens)]
    assert sum(pieces) == sum(lengths)
    rows = pack(pieces, row_tokens)
    assert sorted(index for row in rows for index in row) == list(range(len(pieces)))
    for row in rows:
        inside = [pieces[index] for index in row]
        assert 0 < sum(inside) <= row_tokens
        groups = alike(inside)
        assert sorted(place for group in groups for place in group) == list(range(len(row)))
        for group in groups:
            sizes = [inside[place] for place in group]
            assert max(sizes) == sizes[0]
            assert min(sizes) >= sizes[0] * 0.75 - 4


def rows_hold_every_token_of_every_sample(given: tuple[list[list[tuple[str, list[tuple[int, bool]]]]], int]) -> None:
    drawn, row_tokens = given
    rounds = [[Sample(kind, [id for id, _ in tokens], [flag for _, flag in tokens]) for kind, tokens in samples] for samples in drawn]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "train"
        ledger = write_rows(folder, rounds, row_tokens, {"preparation_digest": "x"})
        rows = PackedRows(folder)
        assert rows.ledger == ledger == Ledger.model_validate_json(ledger.model_dump_json())
        found = Counter[tuple[int, bool]]()
        for index in range(len(rows)):
            row = rows[index]
            assert 0 < len(row.tokens) == len(row.learned) == sum(row.lengths) <= row_tokens
            found.update(zip(row.tokens.tolist(), row.learned.tolist(), strict=True))
        assert len(rows) == sum(ledger.rounds)
    assert found == Counter((id, bool(flag)) for samples in drawn for _, tokens in samples for id, flag in tokens)
    for kind, account in ledger.accounts.items():
        assert account.tokens == account.trained + account.dropped
        assert account.tokens == sum(len(tokens) for samples in drawn for one, tokens in samples if one == kind)
        assert account.dropped == 0


def a_spec_crosses_and_comes_back(values: Mapping[str, Any]) -> None:
    try:
        spec = TrainSpec(**values)
        pairs = spec.to_hyperparameters()
    except SpecError:
        return
    assert all("\n" not in text and len(text) <= 2_500 for text in pairs.values())
    back = TrainSpec.from_hyperparameters({**pairs, "sagemaker_region": '"x"'})
    assert back == spec
    assert back.digest() == spec.digest()
    assert back.preparation_digest() == spec.preparation_digest()
    job = JobSpec(train=spec, data=("a.txt",))
    assert JobSpec(**json.loads(job.model_dump_json())) == job


def any_hyperparameters_are_a_spec_or_refused(pairs: Mapping[str, str]) -> None:
    try:
        spec = TrainSpec.from_hyperparameters(pairs)
    except SpecError:
        return
    try:
        assert TrainSpec.from_hyperparameters(spec.to_hyperparameters()) == spec
    except SpecError as exc:  # what it takes is too long to go back, or looks like a secret
        if "hyperparameter" not in str(exc):
            raise


@functools.cache
def _tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        make_tokenizer().save_pretrained(folder)
        return Tokenizer(Path(folder))


_SPEC = TrainSpec(model="m", max_seq_len=64, too_long="drop")


def any_file_of_records_becomes_examples_or_errors(given: tuple[str, bytes, str]) -> None:
    """From the file's bytes to tokens: what the client writes the runtime reads, and every record is an example or named as broken."""
    kind, body, too_long = given
    texts: list[str] = []

    def add_text(title: str, text: str, source: str) -> bool:
        texts.append(text)
        return True

    with tempfile.TemporaryDirectory() as name, Writer(Path(name)) as writer:
        try:
            part = Part("it", kind, body=body, at_most=100_000)
            told = collect([part], writer, add_text, go_on=True, say=lambda line: None)
            examples = writer.finish()
        except DataError:
            return
        assert told.broken_count + len(texts) + (examples.count if examples else 0) <= told.read
        if examples is None:
            return
        records = list(read_examples(examples.path))
        assert len(records) == examples.count
    spec = _SPEC.model_copy(update={"too_long": too_long})
    try:
        found = example_samples(records, spec, _tokenizer())
    except (StagingError, SpecError):
        return
    assert len(found.samples) + sum(account.left_out for account in found.left_out.values()) == len(records)
    for sample in found.samples:
        assert len(sample.ids) == len(sample.learned) <= spec.max_seq_len


def any_examples_file_is_read_or_an_error(body: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "examples.jsonl"
        file.write_bytes(body)
        with contextlib.suppress(StagingError, SpecError):
            example_samples(read_examples(file), _SPEC, _tokenizer())
        with contextlib.suppress(StagingError):
            list(read_records(file, ("title", "text")))


def what_the_assistant_says_is_learned_and_nothing_else(turns: list[str]) -> None:
    """Users and assistants in turn. No letters of theirs become a control token, and without such letters it is the template's own."""
    tokenizer, theirs = _tokenizer(), make_tokenizer()
    messages = [{"role": role, "content": text} for role, text in zip(itertools.cycle(("user", "assistant")), turns, strict=False)]
    ids, mine = tokenizer.chat(messages)
    assert len(ids) == len(mine)
    counts = Counter(ids)
    end, start, separator = (theirs.convert_tokens_to_ids(word) for word in ("<|im_end|>", "<|im_start|>", "<|endoftext|>"))
    assert (counts[start], counts[end], counts[separator]) == (len(turns), len(turns), 0)
    said = theirs.decode([id for id, own in zip(ids, mine, strict=True) if own], skip_special_tokens=False)
    assert said == "".join(f"{text}<|im_end|>" for text in turns[1::2])
    if not any(word in text for word in SPECIAL for text in turns):
        whole = theirs.apply_chat_template(messages, tokenize=False)
        assert ids == theirs.encode(whole, add_special_tokens=False)


def any_manifest_is_whole_or_has_a_problem(given: tuple[bytes, Mapping[str, bytes]]) -> None:
    text, files = given
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, body in files.items():
            (folder / file).write_bytes(body)
        manifest.write(folder, {"step": 1})
        assert manifest.problem(folder) is None
        for file in files:
            (folder / file).write_bytes(files[file] + b"x")
            assert manifest.problem(folder) is not None
        (folder / manifest.NAME).write_bytes(text)
        problem = manifest.problem(folder)
        assert problem is None or problem.startswith(folder.name)


_FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "model": st.text(min_size=1, max_size=40),
    "recipe": st.sampled_from(["pages", "knowledge", "instruct", "domain-chat", "full-text"]),
    "method": st.sampled_from(["qlora", "lora", "full"]),
    "lora_rank": st.integers(0, 1025),
    "lora_alpha": st.floats(),
    "lora_targets": st.lists(st.text(max_size=12), max_size=4),
    "use_rslora": st.booleans(),
    "use_dora": st.booleans(),
    "lora_dropout": st.floats(0, 1),
    "max_seq_len": st.integers(15, 2**21),
    "objective": st.sampled_from(["auto", "all", "answers"]),
    "too_long": st.sampled_from(["fail", "drop", "cut"]),
    "views": st.lists(st.sampled_from(["document", "paragraph", "sentence"]), max_size=5),
    "questions": st.integers(-1, 17),
    "replay": st.floats(0, 4),
    "epochs": st.integers(0, 10_001),
    "max_steps": st.none() | st.integers(0, 2**70),
    "max_minutes": st.none() | st.floats(),
    "learning_rate": st.floats(0, 1),
    "lr_schedule": st.sampled_from(["cosine", "linear", "constant"]),
    "seed": st.integers(-1, 2**32),
    "keep_merged": st.booleans(),
}
_TRAIN_SPECS = st.fixed_dictionaries(
    {"model": _FIELDS["model"]}, optional={name: values for name, values in _FIELDS.items() if name != "model"}
)
_KEYS = st.sampled_from([*TrainSpec.model_fields, "lora_rnak", "sagemaker_region", "_tuning_objective_metric", ""])
_PAIRS = st.dictionaries(
    _KEYS | st.text(max_size=10), JSON.map(json.dumps) | st.text(max_size=20) | st.integers(-1, 99).map(str), max_size=8
)
_HYPERPARAMETERS = st.builds(
    lambda pairs, whole: {**({"spec_version": "1", "model": '"m"'} if whole else {}), **pairs}, _PAIRS, st.booleans()
)

_CONTROL = st.sampled_from(
    [*SPECIAL, "<|im_end", "|>", "\x02", "\x03", "<", "system\n", "assistant\n", "\n\n", " ", "{{ x }}", "{% if %}", "港", "é"]
)
_SAID = st.lists(_CONTROL | st.text(max_size=8), max_size=6).map("".join)
_TURNS = st.lists(_SAID.map(str.strip).filter(bool), min_size=2, max_size=7)

_COLUMNS = st.sampled_from(
    "text title prompt completion instruction input output response system history messages conversations tools question answer "
    "chosen rejected id role content from value name tool_calls tool_call_id weight Prompt promt".split()
)
_ROLES = st.sampled_from("system user assistant tool human gpt model chatgpt function_call observation bing developer".split())
_TURN = st.dictionaries(st.sampled_from("role from content value name tool_calls weight".split()), _SAID | _ROLES | JSON, max_size=4)
_GOOD_TURN = st.fixed_dictionaries({"role": _ROLES, "content": _SAID}) | st.fixed_dictionaries({"from": _ROLES, "value": _SAID})
_CALL = st.fixed_dictionaries({"role": st.just("assistant"), "tool_calls": st.lists(st.fixed_dictionaries({"function": JSON}), max_size=2)})
_TALK = st.lists(_GOOD_TURN | _TURN | _CALL, max_size=6)
_GUANACO = st.lists(st.sampled_from(["### Human: ", "### Assistant: ", "###", "hello", "\n"]), max_size=8).map("".join)
_RECORD = st.dictionaries(_COLUMNS, _SAID | _GUANACO | _TALK | JSON, max_size=5) | JSON
_LINES = st.lists(_RECORD.map(json.dumps) | st.text(max_size=20), max_size=6)
_JSON_LINES = _LINES.map(lambda lines: "\n".join(lines).encode())
_JSON_FILE = (st.lists(_RECORD, max_size=5) | st.dictionaries(_COLUMNS, st.lists(_SAID | JSON, max_size=3), max_size=4)).map(
    lambda value: json.dumps(value).encode()
)
_CELL = _SAID | st.sampled_from(['"', '""', ",", "\t", "\r\n", "'", ";"])
_CSV = st.builds(
    lambda head, rows, mark: "\n".join(mark.join(row) for row in [head, *rows]).encode(),
    st.lists(_COLUMNS, max_size=4),
    st.lists(st.lists(_CELL, max_size=4), max_size=5),
    st.sampled_from(",\t;"),
)
_BYTES = (
    st.binary(max_size=200)
    | _JSON_LINES
    | _JSON_FILE
    | _CSV
    | _JSON_LINES.map(gzip.compress)
    | st.text(max_size=60).map(lambda text: text.encode("utf-16"))
)
_KINDS = st.sampled_from(["jsonl", "json", "csv", "tsv"])
_TOO_LONG = st.sampled_from(["fail", "drop", "cut"])

_EXAMPLE = st.dictionaries(
    st.sampled_from("form messages tools source prompt completion instruction input text learn_last".split()),
    st.sampled_from(["chat", "completion", "guanaco"]) | _SAID | _TALK | JSON,
    max_size=6,
)
_EXAMPLES = st.binary(max_size=200) | st.lists(_EXAMPLE.map(json.dumps), max_size=4).map(lambda lines: "\n".join(lines).encode())

_TOKENS = st.lists(st.tuples(st.integers(0, 511), st.booleans()), min_size=1, max_size=60)
_ROUNDS = st.lists(
    st.lists(st.tuples(st.sampled_from(["document", "sentence", "question", "chat"]), _TOKENS), min_size=1, max_size=8),
    min_size=1,
    max_size=3,
)
_FILES = st.dictionaries(
    st.text("abc.-_é", min_size=1, max_size=8).filter(lambda name: name.strip(".") and name != manifest.NAME),
    st.binary(max_size=20),
    max_size=3,
)
_MANIFESTS = st.binary(max_size=80) | JSON.map(lambda value: json.dumps(value).encode())
_ENTRIES = st.dictionaries(
    st.text(max_size=8) | st.sampled_from(["..", "/", "a" * 300, "a\0b"]),
    st.dictionaries(st.sampled_from(["bytes", "sha256"]), JSON, max_size=2),
    max_size=3,
)
_MANIFESTS |= _ENTRIES.map(lambda files: json.dumps({"files": files}).encode())

TARGETS = [
    Target(
        "packer", st.tuples(st.lists(st.integers(1, 400), max_size=60), st.integers(1, 200)), samples_are_packed_once_and_no_row_is_over
    ),
    Target("ledger", st.tuples(_ROUNDS, st.integers(1, 40)), rows_hold_every_token_of_every_sample),
    Target("spec", _TRAIN_SPECS, a_spec_crosses_and_comes_back),
    Target("hyperparameters", _HYPERPARAMETERS, any_hyperparameters_are_a_spec_or_refused),
    Target("records", st.tuples(_KINDS, _BYTES, _TOO_LONG), any_file_of_records_becomes_examples_or_errors),
    Target("examples", _EXAMPLES, any_examples_file_is_read_or_an_error),
    Target("chat masks", _TURNS, what_the_assistant_says_is_learned_and_nothing_else),
    Target("manifest", st.tuples(_MANIFESTS, _FILES), any_manifest_is_whole_or_has_a_problem),
]
