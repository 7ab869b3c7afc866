"""Each record in the canonical form of its columns, and what is refused, with what to do."""

from __future__ import annotations

import json
from typing import Any

import pytest

from trimtab.data.forms import canonical, learned
from trimtab.data.turns import FormError

USER, ANSWER = {"role": "user", "content": "Where is she?"}, {"role": "assistant", "content": "At the north quay."}
CALL = {"type": "function", "function": {"name": "berth", "arguments": {"ship": "Vane"}}}
BERTH = {"name": "berth", "description": "Where a ship lies", "parameters": {"type": "object"}}


def content(record: dict[str, Any]) -> dict[str, Any]:
    return canonical(record).content


def messages(*turns: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    found = content({"messages": list(turns), **more})
    assert found["form"] == "chat"
    return list(found["messages"])


def refused(record: dict[str, Any]) -> str:
    with pytest.raises(FormError) as caught:
        canonical(record)
    return str(caught.value)


def test_text_with_and_without_a_title():
    assert content({"text": "One.\r\n\r\n  Two.\n"}) == {"form": "text", "title": "", "text": "One.\n\n  Two."}
    found = canonical({"id": 7, "title": " The \n Vane ", "text": "She is blue.", "url": "x"})
    assert found.content == {"form": "text", "title": "The Vane", "text": "She is blue."}
    assert (found.name, found.used, found.left_out) == ("running text", ("title", "text"), ("id", "url"))


def test_prompt_and_completion_stand_as_they_are():
    found = canonical({"completion": " 42\n", "prompt": "6 * 7 ="})
    assert found.content == {"form": "completion", "prompt": "6 * 7 =", "completion": " 42\n"}
    assert found.used == ("completion", "prompt")


@pytest.mark.parametrize(
    ("record", "instruction", "given", "answer", "name"),
    [
        ({"instruction": "Name it.", "input": "a ship", "output": "Vane"}, "Name it.", "a ship", "Vane", "Alpaca"),
        ({"instruction": "Name it.", "input": "", "output": "Vane", "text": "all of it"}, "Name it.", "", "Vane", "Alpaca"),
        ({"instruction": "Name it.", "context": "a ship", "response": "Vane"}, "Name it.", "a ship", "Vane", "Alpaca"),  # Dolly
        ({"question": "Name?", "answer": "Vane"}, "Name?", "", "Vane", "question and answer"),  # GSM8K
        ({"query": "Name?", "response": "Vane", "type": "x"}, "Name?", "", "Vane", "question and answer"),  # MetaMathQA
        ({"input": "Name?", "output": "Vane"}, "Name?", "", "Vane", "question and answer"),
        ({"prompt": "Name?", "response": "Vane"}, "Name?", "", "Vane", "question and answer"),
        ({"Q": "Name?", " A ": "Vane"}, "Name?", "", "Vane", "question and answer"),
    ],
)
def test_a_question_and_its_answer(record: dict[str, str], instruction: str, given: str, answer: str, name: str):
    found = canonical(record)
    assert found.content == {"form": "completion", "instruction": instruction, "input": given, "completion": answer}
    assert found.name == name


def test_what_comes_before_a_question_makes_it_a_conversation():
    record = {"instruction": "And now?", "input": "noon", "output": "Away.", "system": "Be short.", "history": [["Where?", "Here."]]}
    assert content(record) == {
        "form": "chat",
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "Where?"},
            {"role": "assistant", "content": "Here."},
            {"role": "user", "content": "And now?\n\nnoon"},
            {"role": "assistant", "content": "Away."},
        ],
    }
    assert content({**record, "system": "", "history": None})["form"] == "completion"
    assert "history is no list of pairs" in refused({**record, "history": [["Where?"]]})


def test_conversations_of_openai():
    turns = [{"role": "system", "content": ""}, {**USER, "name": "Ida"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    tool = {"role": "tool", "content": "", "tool_call_id": "c1"}
    found = content({"messages": [*turns, tool, ANSWER], "tools": [BERTH]})
    assert found["messages"] == [turns[0], turns[1], {"role": "assistant", "content": "", "tool_calls": [CALL]}, tool, ANSWER]
    assert found["tools"] == [{"type": "function", "function": BERTH}]
    assert content({"messages": [USER, ANSWER], "tools": json.dumps(found["tools"])})["tools"] == found["tools"]
    assert "tools" not in content({"messages": [USER, ANSWER], "tools": []})


def test_what_others_call_the_same():
    in_text = {"id": "c1", "type": "function", "function": {"name": "berth", "arguments": '{"ship": "Vane"}'}}
    assert messages(USER, {"role": "assistant", "tool_calls": [in_text]})[1]["tool_calls"] == [{"id": "c1", **CALL}]
    old = [USER, {"role": "assistant", "content": None, "function_call": {"name": "berth", "arguments": '{"ship": "Vane"}'}}]
    assert messages(*old, {"role": "function", "content": "north", "name": "berth"})[1:] == [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "north", "name": "berth"},
    ]
    parts = [{"type": "text", "text": "At the "}, {"type": "text", "text": "north quay."}]
    assert messages(USER, {"role": "assistant", "content": parts})[1] == ANSWER
    assert messages({"role": "developer", "content": "Be short."}, USER, ANSWER)[0]["role"] == "system"
    assert messages(USER, ANSWER, system="Be short.")[0] == {"role": "system", "content": "Be short."}
    assert content({"conversation": json.dumps([USER, ANSWER])})["messages"] == [USER, ANSWER]


def test_sharegpt():
    record = {
        "id": "x",
        "system": "Be short.",
        "tools": json.dumps([BERTH]),
        "conversations": [
            {"from": "human", "value": "Where is she?"},
            {"from": "function_call", "value": '{"name": "berth", "arguments": {"ship": "Vane"}}'},
            {"from": "observation", "value": "north"},
            {"from": "gpt", "value": "At the north quay.", "markdown": None, "score": 3},
        ],
    }
    found = canonical(record)
    assert found.name == "ShareGPT"
    assert found.left_out == ("id", "conversations.score")
    assert found.content["messages"] == [
        {"role": "system", "content": "Be short."},
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "north"},
        ANSWER,
    ]
    assert found.content["tools"] == [{"type": "function", "function": BERTH}]


def test_conversational_prompt_and_completion_learn_the_completion():
    record = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
    assert content(record) == {"form": "chat", "messages": [USER, ANSWER, USER, ANSWER], "learn_last": True}
    called = [{"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "north"}, ANSWER]
    assert content({"prompt": [USER], "completion": called})["messages"] == [USER, *called]
    agent = {"prompt": [USER, called[0], called[1]], "completion": [ANSWER]}
    assert content(agent) == {"form": "chat", "messages": [USER, *called], "learn_last": True, "learn_from": 3}
    assert "give both as texts, or both as lists" in refused({"prompt": [USER], "completion": "Away."})
    assert "prompt ends with a turn of the assistant" in refused({"prompt": [USER, ANSWER], "completion": [ANSWER]})
    assert "completion has a turn of the user" in refused({"prompt": [USER], "completion": [ANSWER, USER, ANSWER]})


def test_a_call_in_whatever_case_its_role_is_written():
    call = '{"name": "berth", "arguments": {"ship": "Vane"}}'
    turns = [{"from": "Human", "value": "Where?"}, {"from": " Function_Call", "value": call}, {"from": "GPT", "value": "North."}]
    assert content({"conversations": turns})["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert "there is no role 'function_call' beside content" in refused({"messages": [{"role": "Function_call", "content": call}]})


def test_what_is_not_read_of_a_call_is_said():
    call = {"id": "c1", "index": 0, "type": "function", "function": {"name": "berth", "arguments": "", "strict": True, "note": None}}
    found = canonical({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]})
    assert found.content["messages"][1]["tool_calls"] == [{"id": "c1", "type": "function", "function": {"name": "berth", "arguments": {}}}]
    assert found.left_out == ("messages.tool_calls.function.strict", "messages.tool_calls.index")
    turns = [{"from": "human", "value": "?"}, {"from": "function_call", "value": '{"name": "berth", "arguments": null, "why": 1}'}]
    assert canonical({"conversations": turns}).left_out == ("conversations.value.why",)


@pytest.mark.parametrize("label", [False, "False", " false"])
def test_a_completion_that_is_labelled_false_is_not_imitated(label: Any):
    for record in ({"prompt": "p", "completion": "c"}, {"prompt": [USER], "completion": [ANSWER]}):
        assert "its label is false: an example of what not to say" in refused({**record, "Label": label})
        assert canonical({**record, "label": True}).left_out == ("label",)
        assert canonical({**record, "label": 0}).left_out == ("label",)


def test_guanaco():
    text = "### Human: Where is she?### Assistant: At the north quay."
    assert canonical({"text": text}).content == {"form": "guanaco", "text": text}
    assert 'it begins with "### Human:" and has no "### Assistant:"' in refused({"text": "### Human: Where is she?\n### Assistant: "})
    assert content({"text": "See ### Human: and ### Assistant: there."})["form"] == "text"


def test_of_several_forms_the_most_particular_is_read():
    record = {"text": "t", "prompt": "p", "completion": "c", "instruction": "i", "output": "o", "messages": [USER, ANSWER]}
    found = canonical(record)
    assert (found.content["form"], found.left_out) == ("chat", ("text", "prompt", "completion", "instruction", "output"))
    del record["messages"]
    assert canonical(record).content == {"form": "completion", "prompt": "p", "completion": "c"}
    assert canonical({**record, "prompt": None, "completion": None}).name == "Alpaca"


def test_a_column_that_only_sounds_alike_is_left_out():
    record = {"question": "q", "answer": "a", "story": "s", "system_id": 1, "answers": ["a"], "question_id": 7}
    assert canonical(record).left_out == ("story", "system_id", "answers", "question_id")


def test_which_tokens_are_learned_is_said():
    assert learned(canonical({"text": "x"}).name, "answers") == "loss on every token"
    assert learned(canonical({"prompt": "p", "completion": "c"}).name, "auto") == "loss on the completion"
    assert learned(canonical({"messages": [USER, ANSWER]}).name, "auto") == "loss on every assistant turn"
    assert learned(canonical({"messages": [USER, ANSWER]}).name, "all") == "loss on every token"
    guanaco = canonical({"text": "### Human: a ### Assistant: b"}).name
    assert (learned(guanaco, "auto"), learned(guanaco, "answers")) == ("loss on every token", "loss on what the assistant says")


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"mesages": [USER, ANSWER]}, "did you mean messages for mesages?"),
        ({"prompt": "p", "complation": "c"}, "did you mean completion for complation?"),
        ({"instruction": "i", "imput": "x", "output": "o"}, "there is no column 'imput'; did you mean input?"),
        ({"messages": [USER, ANSWER], "tool": []}, "there is no column 'tool'; did you mean tools?"),
        ({"conversations": [{"form": "human", "value": "x"}]}, "turn 1 of conversations: there is no 'form'; did you mean from?"),
        ({"messages": [USER, {"role": "assistant", "contnet": "x"}]}, "turn 2 of messages: there is no 'contnet'; did you mean content?"),
        ({"messages": [USER, {"role": "asistant", "content": "x"}]}, "there is no role 'asistant'; did you mean assistant?"),
        ({"messages": [USER, {"role": "qx", "content": "x"}]}, "there is no role 'qx'; roles are user, assistant, system, tool"),
        ({"a": 1, "b": 2}, "its columns are a, b, which make no form of record; the question is missing"),
        ({"prompt": "p"}, "the answer is missing: completion, output"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "a preference record"),
        ({}, "it has no columns with a value"),
        ({"question": "q", "query": "p", "answer": "x"}, "the columns question and query could each be the question; keep one of them"),
        ({"question": "q", "answer": None}, "answer is null; give it a text"),
        ({"question": "q", "answer": " \n"}, "answer is empty; write its text"),
        ({"prompt": "p", "completion": 3}, "completion is a number and not a text"),
        ({"prompt": "p", "completion": ["x"]}, "prompt is a text and completion is a list"),
        ({"instruction": " ", "input": "", "output": "o"}, "instruction and input are empty"),
        ({"text": {"a": 1}}, "text is an object and not a text"),
        ({"messages": []}, "messages is empty; write its turns"),
        ({"messages": "[{'role': 'user'}]"}, "messages is a text and not JSON"),
        ({"messages": {"role": "user"}}, "messages is an object and not a list of turns"),
        ({"messages": ["hello"]}, "turn 1 of messages: it is a text and not an object"),
        ({"messages": [USER]}, "messages has no turn of the assistant"),
        ({"messages": [{"role": "user", "content": ""}, ANSWER]}, "turn 1 of messages: what the user says is empty"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "turn 2 of messages: its content is null"),
        ({"messages": [USER, {"role": "assistant"}]}, "turn 2 of messages: it has no content"),
        ({"messages": [{"content": "x"}]}, "turn 1 of messages: it has no role"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "its weight is not 1"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "its content is a number"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "a part of type image_url, and only text"),
        ({"messages": [{**USER, "tool_calls": [CALL]}]}, "a turn of the user cannot call tools"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {}}]}]}, "a tool call has no name"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{**CALL, "id": 7}]}]},
            "the id of a tool call is a number and not a text",
        ),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "x", "arguments": []}]}]}, "are a list and not an object"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "x", "arguments": 0}]}]}, "are a number and not an object"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "x", "parameters": {}}]}]}, "parameters and no arguments"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [CALL], "function_call": CALL}]}, "two names of the same; keep one"),
        ({"Text": "a", "text": "b"}, "the columns 'Text' and 'text' are one name; keep one of them"),
        ({"messages": [USER, ANSWER], "tools": "berth"}, "tools is a text and not JSON"),
        ({"messages": [USER, ANSWER], "tools": [{"parameters": {}}]}, "tool 1 has no name"),
        ({"messages": [{"role": "system", "content": "a"}, USER, ANSWER], "system": "b"}, "the conversation's own system turn differ"),
    ],
)
def test_what_is_refused_is_named_with_what_to_do(record: dict[str, Any], said: str):
    assert said in refused(record)
    assert any(mark in refused(record) for mark in (";", "?"))
