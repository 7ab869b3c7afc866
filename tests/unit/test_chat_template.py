"""Conversations in the habits of real chat templates: tokens as transformers has them, and learned is what the assistant says."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from support.chat_templates import BLOCKS, FAMILIES, NO_SYSTEM, TAKES_TOOLS, make_tokenizer
from trimtab.errors import SpecError
from trimtab_runtime.tokenizer import Tokenizer

TOOLS = [
    {"type": "function", "function": {"name": "tide", "description": "Height", "parameters": {"properties": {"at": {"type": "string"}}}}}
]


class Family:
    def __init__(self, ours: Tokenizer, theirs: Any, ends: set[int], control: set[int]) -> None:
        self.ours, self.theirs, self.ends, self.control = ours, theirs, ends, control

    def reference(self, messages: list[dict[str, Any]], tools: Any = None, *, prompt: bool = False) -> list[int]:
        found: list[int] = self.theirs.apply_chat_template(
            messages, tools=tools, tokenize=True, add_generation_prompt=prompt, return_dict=False
        )
        return found

    def runs(self, ids: list[int], mine: list[bool]) -> list[list[int]]:
        """The stretches of tokens that are the assistant's."""
        found: list[list[int]] = []
        for place, (token, own) in enumerate(zip(ids, mine, strict=True)):
            if own and (not place or not mine[place - 1]):
                found.append([])
            if own:
                found[-1].append(token)
        return found


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    found = {}
    for name, (template, control, ends) in FAMILIES.items():
        folder = tmp_path_factory.mktemp(name)
        theirs = make_tokenizer(folder, template, control, ends, blanks=name == "folded")
        ours = Tokenizer(folder)
        ids = {word: theirs.convert_tokens_to_ids(word) for word in control}
        found[name] = Family(ours, theirs, {ids[word] for word in ends}, set(ids.values()))
    return found


def talk(*turns: str, system: str | None = None) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    said = [{"role": roles[number % 2], "content": text} for number, text in enumerate(turns)]
    return [{"role": "system", "content": system}, *said] if system is not None else said


letters = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=30)
texts = st.one_of(
    letters, st.sampled_from(["", " ", "\n", "    def f():\n        return 1\n", "Who keeps the key?", "<3 </thing", "42", "é́", "🗝️ key"])
)
talks = st.lists(texts, min_size=1, max_size=3).flatmap(
    lambda users: st.tuples(st.just(users), st.lists(texts, min_size=len(users), max_size=len(users)), st.none() | texts)
)


@pytest.mark.parametrize("name", FAMILIES)
@given(drawn=talks)
def test_any_conversation_has_the_ids_of_apply_chat_template_and_learns_what_the_assistant_says(
    families: dict[str, Family], name: str, drawn: tuple[list[str], list[str], str | None]
) -> None:
    family = families[name]
    users, answers, system = drawn
    messages = talk(*(text for pair in zip(users, answers, strict=True) for text in pair), system=None if name in NO_SYSTEM else system)
    assume(not any(word in one["content"] for one in messages for word in (*FAMILIES[name][1], "</think>", "<tool_response>")))
    assume(name != "open" or answers[-1])  # of nothing, without an end, nothing is learned
    assume(name != "moved" or len(set(users)) == len(users))  # it looks for the last turn by its words
    ids, mine = family.ours.chat(messages)
    assert ids == family.reference(messages)
    assert family.ours.prompt(messages[:-1]) == family.reference(messages[:-1], prompt=True)
    runs = family.runs(ids, mine)
    assert len(runs) == len(answers)
    for run, answer in zip(runs, answers, strict=True):
        last = run is runs[-1]
        if not (name == "open" and last):  # there nothing ends it
            assert run[-1] in family.ends
            run = run[:-1]
        said = family.theirs.decode(run)
        if name == "thinking" and last:
            assert said.startswith("<think>\n\n</think>\n\n")
        said = said.removeprefix("<think>\n\n</think>\n\n")
        assert said.strip() == family.theirs.decode(family.ours.text(answer)).strip()
        if name in ("plain", "blocks", "open", "ended"):
            assert said.removesuffix(answer) in ("", "\n")  # the header's line break may be one token with the answer's first
    if name == "blocks":
        theirs = family.theirs.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        assert mine == [bool(flag) for flag in theirs["assistant_masks"]]


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
def test_what_spells_a_control_token_never_is_one(families: dict[str, Family], name: str, data: st.DataObject) -> None:
    family = families[name]
    words = st.sampled_from([*FAMILIES[name][1], "[INST]", "<|im_", "end|>", " key", "\n", "<", "|>", "</s>"])
    spelled = [*data.draw(st.lists(st.lists(words, max_size=5).map("".join), min_size=4, max_size=4))]
    messages = talk(*(f"{number}{text}." for number, text in enumerate(spelled)))
    harmless = talk(*(f"{number}." for number in range(4)))
    ids, mine = family.ours.chat(messages)
    assert [token for token in ids if token in family.control] == [
        token for token in family.ours.chat(harmless)[0] if token in family.control
    ]
    runs = family.runs(ids, mine)
    assert len(runs) == 2
    for run, text in zip(runs, (messages[1]["content"], messages[3]["content"]), strict=True):
        assert text in family.theirs.decode(run)


def calls(*names: str, **arguments: Any) -> dict[str, Any]:
    made = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name in names]
    return {"role": "assistant", "content": "", "tool_calls": made}


def with_tools(word: str = "") -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": f"How high is the tide?{word}"},
        calls("tide", at=f"noon{word}"),
        {"role": "tool", "name": "tide", "content": f"Three metres{word}"},
        {"role": "assistant", "content": "It is three metres."},
        {"role": "user", "content": "And at night?"},
        calls("tide", at="night"),
        {"role": "tool", "name": "tide", "content": "One"},
        {"role": "assistant", "content": "One metre."},
    ]


@pytest.mark.parametrize("name", TAKES_TOOLS)
def test_calls_of_tools_are_learned_whole_and_with_their_ends(families: dict[str, Family], name: str) -> None:
    family = families[name]
    ids, mine = family.ours.chat(with_tools(), TOOLS)
    assert ids == family.reference(with_tools(), TOOLS)
    assert family.ours.prompt(with_tools()[:3], TOOLS) == family.reference(with_tools()[:3], TOOLS, prompt=True)
    runs = family.runs(ids, mine)
    assert len(runs) == 4
    assert all(run[-1] in family.ends for run in runs)
    said = [family.theirs.decode(run) for run in runs]
    opening = {"headers": '<|python_tag|>{"name"', "moved": "[TOOL_CALLS] [{", "thinking": '\n<tool_call>\n{"name"'}[name]
    assert opening in said[0][:40]
    assert [one.count("noon") for one in said] == [1, 0, 0, 0]
    assert "three metres" in said[1]
    assert "night" in said[2]
    assert "user" not in "".join(said)


@pytest.mark.parametrize("name", TAKES_TOOLS)
def test_tools_and_their_arguments_spell_no_control_token(families: dict[str, Family], name: str) -> None:
    family = families[name]
    for word in FAMILIES[name][1]:
        tool = {"type": "function", "function": {"name": "tide", "description": word, "parameters": {"properties": {word: {"type": word}}}}}
        found = family.ours.chat(with_tools(word), [tool])[0]
        plain = family.ours.chat(with_tools(), TOOLS)[0]
        assert [token for token in found if token in family.control] == [token for token in plain if token in family.control]
        assert family.theirs.decode(found).count(word) >= 5


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - set(TAKES_TOOLS) - {"folded"}))
def test_a_template_that_ignores_tools_is_refused_by_name(families: dict[str, Family], name: str) -> None:
    with pytest.raises(SpecError, match=r'the chat template ignores tools: use a model .* or remove "tools"'):
        families[name].ours.chat(talk("How high?", "Three metres."), TOOLS)


def test_a_thought_is_learned_where_the_template_keeps_it(families: dict[str, Family]) -> None:
    family = families["thinking"]
    messages = talk("Who?", "<think>\nHm, keys.\n</think>\n\nThe keeper.", "When?", "<think>\nHm, dawn.\n</think>\n\nAt dawn.")
    ids, mine = family.ours.chat(messages)
    assert ids == family.reference(messages)
    assert [family.theirs.decode(run) for run in family.runs(ids, mine)] == [
        "The keeper.<|im_end|>",
        "<think>\nHm, dawn.\n</think>\n\nAt dawn.<|im_end|>",
    ]
    assert family.ours.template.conversation(messages).thoughts == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_only_turns_from_the_first_that_is_asked_for_are_learned(families: dict[str, Family], name: str) -> None:
    family = families[name]
    messages = talk("Who?", "The keeper.", "Where?", "In the tower.")
    ids, mine = family.ours.chat(messages, first=3)
    assert ids == family.ours.chat(messages)[0]
    (run,) = family.runs(ids, mine)
    assert "keeper" not in family.theirs.decode(run)
    assert "In the tower." in family.theirs.decode(run)


def test_a_conversation_that_the_assistant_begins(families: dict[str, Family]) -> None:
    family = families["ended"]
    messages = [{"role": "assistant", "content": "Hello."}, *talk("Who?", "The keeper.")]
    ids, mine = family.ours.chat(messages)
    assert ids == family.reference(messages)
    assert [family.theirs.decode(run) for run in family.runs(ids, mine)] == ["Hello.<|end|>", "The keeper.<|end|>"]


DROPS = (
    "{% for m in messages if m.role == 'user' %}{{ '<s>' + m.content + '</s>' }}{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
)
TURNED = (
    "{% for m in messages | reverse %}{{ '<s>' + m.role + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant{% endif %}"
)
EMPTY_BLOCKS = BLOCKS.replace("{% generation %}", "").replace("{% endgeneration %}", "{% generation %}{% endgeneration %}")
NO_SYSTEM_WORDS = (
    "{% for m in messages if m.role != 'system' %}{{ '<s>' + m.role + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant{% endif %}"
)
MARKED = "{% generation %}{{ m.content + '</s>' }}{% endgeneration %}"
BLOCKS_OF_TWO = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>user' + m.content + '</s>' }}{% elif m.role == 'assistant' %}<s>assistant"
    + MARKED
    + "{% endif %}{% endfor %}"
)
BLOCKS_WITHOUT_CALLS = (
    "{{ tools | tojson }}{% for m in messages %}{{ '<s>' + m.role }}{% if m.role == 'assistant' %}"
    + MARKED
    + "{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"
)
CALLS = (
    "{{ tools | tojson }}{% for m in messages %}{{ '<s>' + m.role + m.content }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }}GIVEN</call>{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant{% endif %}"
)
NAMES_ALONE = CALLS.replace("GIVEN", "")
FIRST_ALONE = CALLS.replace("GIVEN", " {{ (c.function.arguments | dictsort | first)[1] }}")
NO_TEXT_BESIDE_CALLS = (
    "{{ tools | tojson }}{% for m in messages %}{{ '<s>' + m.role }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}"
    "{{ m.content }}{% endif %}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (DROPS, talk("Who keeps it?", "The keeper."), "leaves out or moves a turn of the assistant: remove it"),
        (TURNED, talk("Who keeps it?", "The keeper.", "Where?", "In the tower."), "chat template (lays|leaves out|does not)"),
        (NO_SYSTEM_WORDS, talk("Who keeps it?", "The keeper.", system="Be brief."), "leaves out a system message: remove it"),
        (NO_TEXT_BESIDE_CALLS, [*talk("How high?"), {**calls("tide"), "content": "Let me look."}], "beside a tool call: remove the text"),
        ("{{ raise_exception('only pages') }}", talk("Who?", "I."), "refuses this conversation: only pages"),
        ("{{ messages[7].content.strip() }}", talk("Who?", "I."), "refuses this conversation"),
        (EMPTY_BLOCKS, talk("Who?", "I."), "marks nothing that the assistant says"),
        (BLOCKS_OF_TWO, talk("Who keeps it?", "The keeper.", system="Be brief."), "leaves out a system message: remove it"),
        (BLOCKS_OF_TWO, [*talk("High?", "Let me see."), *with_tools()[2:4]], "leaves out a tool message: remove it"),
        (BLOCKS_WITHOUT_CALLS, with_tools(), "leaves out a tool call: use a model whose template takes tools"),
        (NAMES_ALONE, with_tools(), r"leaves out what is given to tide\(\) in a tool call: use a model"),
        (NAMES_ALONE, [*talk("How high?"), calls("tide", day=17)], r"leaves out what is given to tide\(\) in a tool call"),
        (FIRST_ALONE, [*talk("How high?"), calls("tide", at="noon", days=["today", "tomorrow"])], r"leaves out what is given to tide\(\)"),
        (FIRST_ALONE, [*talk("How high?"), calls("tide", at="noon", to="now", sign="+")], r"leaves out what is given to tide\(\)"),
    ],
    ids=[
        *("drops", "turned", "no system", "no text beside calls", "raises", "fails", "empty blocks", "blocks without system"),
        *("blocks without tools", "blocks without calls", "names alone", "no number", "no list", "no sign"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_seen_through_is_refused(tmp_path: Path, template: str, messages: list[Any], reason: str) -> None:
    make_tokenizer(tmp_path, template, ["<s>", "</s>"], ["</s>"])
    tools = TOOLS if any("tool_calls" in one for one in messages) else None
    with pytest.raises(SpecError, match=reason):
        Tokenizer(tmp_path).chat(messages, tools)


def test_what_a_call_gives_may_be_nested_and_too_deeply_is_refused(families: dict[str, Family]) -> None:
    def nested(depth: int) -> list[dict[str, Any]]:
        given: Any = "noon"
        for _ in range(depth):
            given = [given]
        return [*talk("How high?"), calls("tide", at=given)]

    template = families["moved"].ours.template
    assert template.conversation(nested(300), TOOLS).written
    with pytest.raises(SpecError, match="nested too deeply: make it flatter"):
        template.conversation(nested(900), TOOLS)
    for depth in range(400, 500):  # wherever it gets too deep
        with contextlib.suppress(SpecError):
            template.conversation(nested(depth), TOOLS)


GIVEN = {"at": "high <b>noon</b>", "days": 3, "height": {"over": 2.5, "sign": "+", "in": ["metres", "é"]}, "sure": True, "not": None}


@pytest.mark.parametrize(
    "spelling",
    [
        "{{ c.function.arguments | tojson }}",
        "{{ c.function.arguments }}",
        "{{ c.function.arguments.values() | list | tojson(ensure_ascii=True) }}",
    ],
    ids=["JSON", "Python", "ASCII"],
)  # fmt: skip
def test_a_call_that_the_template_spells_whole_is_learned(tmp_path: Path, spelling: str) -> None:
    make_tokenizer(tmp_path, CALLS.replace("GIVEN", spelling), ["<s>", "</s>"], ["</s>"])
    tokenizer = Tokenizer(tmp_path)
    messages = [*talk("How high?"), calls("tide", **GIVEN)]
    found = tokenizer.template.conversation(messages, TOOLS)
    ((begin, end),) = found.written
    assert found.text[begin:end].startswith("<call>tide{" if "values" not in spelling else "<call>tide[")
    assert found.text[begin:end].endswith("</call></s>")


def test_a_long_conversation_is_rendered_a_few_times_not_once_for_each_turn(families: dict[str, Family]) -> None:
    template = families["plain"].ours.template
    said, marked = list[int](), template.marked

    def counted(messages: Any, tools: Any, generation_prompt: bool) -> Any:
        said.append(len(messages))
        return marked(messages, tools, generation_prompt)

    template.marked = counted  # type: ignore[method-assign]
    try:
        for system in (None, "Be brief."):
            said.clear()
            messages = talk(*(f"What is number {number}?" for number in range(200)), system=system)
            assert len(template.conversation(messages).written) == 100
            assert sum(said) < 6 * len(messages)
    finally:
        template.marked = marked  # type: ignore[method-assign]


def test_an_unwanted_text_is_not_looked_through(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, DROPS, ["<s>", "</s>"], ["</s>"])
    template = Tokenizer(tmp_path).template
    found = template.conversation(talk("Who keeps it?", "The keeper."), unwanted=lambda shown: "keeps" in shown.text)
    assert (found.text, found.written) == ("<s>Who keeps it?</s>", ())


def test_a_template_for_tools_beside_the_other_is_taken_for_tools(tmp_path: Path) -> None:
    template, control, ends = FAMILIES["headers"]
    theirs = make_tokenizer(tmp_path, {"default": FAMILIES["plain"][0], "tool_use": template}, control, ends)  # type: ignore[arg-type]
    ours = Tokenizer(tmp_path)
    assert ours.chat(with_tools(), TOOLS)[0] == theirs.apply_chat_template(with_tools(), tools=TOOLS, tokenize=True, return_dict=False)
    plain = talk("Who?", "The keeper.")
    assert ours.chat(plain)[0] == theirs.apply_chat_template(plain, tokenize=True, return_dict=False)
