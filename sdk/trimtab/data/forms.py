"""The forms of training records: which columns make which, and each record as the one canonical object of its form. Pure.

form         columns                                                     becomes
text         text (title)                                                a document
guanaco      text with "### Human: ... ### Assistant: ..."               guanaco: text
prompt       prompt, completion: two strings                             completion: prompt, completion, joined as they are
             prompt, completion: two lists of messages                   chat, of which only the completion is learned
alpaca       instruction | question | query | prompt | q | input, and    completion: instruction, input, completion; with system or
             output | response | answer | completion | a                 history: chat
             (input | context) (system | system_prompt) (history)
chat         messages | conversations | conversation: turns of           chat: messages, tools
             role and content (OpenAI) or from and value (ShareGPT)
             (tools | functions) (system | system_prompt)

Of the columns of several forms the most particular one's are read: chat, prompt, alpaca, text. What is left out is said.
Sources: OpenAI's chat format, FastChat's ShareGPT, Stanford Alpaca, TRL's "dataset formats" and LLaMA-Factory's data README, which
agree on these names.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trimtab.data.turns import FormError, messages_of, nearest, said, text_of, tools_of

CHAT = ("messages", "conversations", "conversation")
TOOLS = ("tools", "functions")
SYSTEM = ("system", "system_prompt")
ASKED = ("instruction", "question", "query", "prompt", "q", "input")
ANSWERED = ("output", "response", "answer", "completion", "a")
GIVEN = ("input", "context")
KNOWN = frozenset((*CHAT, *TOOLS, *SYSTEM, *ASKED, *ANSWERED, *GIVEN, "history", "text", "title"))
"""Every column that some form reads."""
READ = KNOWN | {"label"}
"""Every column whose value matters. A reader of wide tables need not read others."""

_HUMAN = re.compile(r"\s*###\s*Human\s*:")
_ASSISTANT = re.compile(r"###\s*Assistant\s*:[ \t]*(.?)", re.S)

Form = Literal["text", "prompt", "alpaca", "chat"]


@dataclass(frozen=True)
class Shape:
    """How records with certain columns are read. `columns` maps what a column is to its name in the record."""

    form: Form
    columns: Mapping[str, str]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class Canonical:
    """A record in canonical form, without `source`: `name` says its form in words, `used` are the columns read, `left_out` the others
    (those of turns as "messages.id")."""

    name: str
    used: tuple[str, ...]
    left_out: tuple[str, ...]
    content: dict[str, Any]


def canonical(record: Mapping[str, Any]) -> Canonical:
    """`record` in the canonical form of its columns. A column that is null counts as absent where it may be.

    Raises FormError with what is wrong and what to do: no form has these columns, a name that is nearly right, a value that is null,
    empty or of the wrong type, a conversation without an answer.
    """
    columns = tuple(name for name, value in record.items() if value is not None)
    try:
        shape = shape_of(columns)
    except FormError:
        if len(columns) < len(record) and (null := _null_column(tuple(record), columns)):
            raise FormError(f"{null} is null; give it a text, or remove the record") from None
        raise
    return _WRITERS[shape.form](record, shape)


def learned(name: str, objective: str) -> str:
    """Which tokens of records of the form called `name` are learned, in words."""
    if objective == "all" or (name == TEXT) or (name == GUANACO and objective != "answers"):
        return "loss on every token"
    return {
        ALPACA: "loss on the answer",
        ASKED_AND_ANSWERED: "loss on the answer",
        PROMPT: "loss on the completion",
        PAIRS: "loss on the completion's turns",
        GUANACO: "loss on what the assistant says",
    }.get(name, "loss on every assistant turn")


TEXT, GUANACO, PROMPT, PAIRS = "running text", "Guanaco", "prompt and completion", "conversational prompt and completion"
ALPACA, ASKED_AND_ANSWERED = "Alpaca", "question and answer"
OPENAI, SHAREGPT = "conversations", "ShareGPT"


@functools.lru_cache(maxsize=1024)
def shape_of(columns: tuple[str, ...]) -> Shape:
    """The form of records with these columns, none of them null. Names are compared without case and outer blanks.

    Raises FormError when no form has them, two could be the same thing, or one is nearly a name that the form has.
    """
    names = {name.strip().lower(): name for name in reversed(columns)}
    for name in columns if len(names) < len(columns) else ():
        if (first := names[name.strip().lower()]) != name and name.strip().lower() in KNOWN:
            raise FormError(f"the columns {first!r} and {name!r} are one name; keep one of them")
    read: dict[str, str] = {}
    form: Form
    if chat := _one_of("conversation", CHAT, names):
        form, read = "chat", {"messages": chat} | _some(tools=_one_of("tools", TOOLS, names), system=_one_of("system", SYSTEM, names))
        optional: Sequence[str] = (*TOOLS, *SYSTEM)
    elif "prompt" in names and "completion" in names:
        form, read = "prompt", {"prompt": "prompt", "completion": "completion"} | _some(tools=_one_of("tools", TOOLS, names))
        optional = TOOLS
    elif (asked := _asked(names)) and (answered := _one_of("answer", ANSWERED, names)):
        given = _one_of("input", [name for name in GIVEN if name != asked], names)
        more = _some(input=given, system=_one_of("system", SYSTEM, names), history="history" if "history" in names else None)
        form, read = "alpaca", {"instruction": asked, "completion": answered} | more
        optional = (*GIVEN, *SYSTEM, "history")
    elif "text" in names:
        form, read = "text", {"text": "text"} | _some(title="title" if "title" in names else None)
        optional = ("title", *CHAT, "instruction", "completion", "prompt")
    else:
        raise FormError(_no_form(columns, names))
    for name in names:
        if name not in read.values() and name not in KNOWN and (near := nearest(name, [word for word in optional if word not in names])):
            raise FormError(f"there is no column {names[name]!r}; did you mean {near}? Rename it, or remove it")
    used = {part: names[name] for part, name in sorted(read.items(), key=lambda item: columns.index(names[item[1]]))}
    return Shape(form, used, tuple(name for name in columns if name not in used.values()))


def _asked(names: Mapping[str, str]) -> str | None:
    """The column that asks. `input` asks only where nothing else does; beside a question it is what the question is about."""
    return _one_of("question", ASKED[:-1], names) or ("input" if "input" in names else None)


def _one_of(what: str, candidates: Iterable[str], names: Mapping[str, str]) -> str | None:
    found = [name for name in candidates if name in names]
    if len(found) > 1:
        raise FormError(f"the columns {' and '.join(found)} could each be the {what}; keep one of them")
    return found[0] if found else None


def _some(**columns: str | None) -> dict[str, str]:
    return {part: name for part, name in columns.items() if name is not None}


def _no_form(columns: Sequence[str], names: Mapping[str, str]) -> str:
    if not columns:
        return "it has no columns with a value; remove it"
    shown = ", ".join(column if len(column) <= 40 else column[:40] + "…" for column in columns[:12])
    if "chosen" in names or "rejected" in names:
        return f"its columns are {shown}: a preference record, of which there is nothing to imitate; name what to learn completion"
    hints = [f"did you mean {near} for {names[name]}?" for name in names if name not in KNOWN and (near := nearest(name, sorted(KNOWN)))]
    if any(name in ASKED for name in names):
        hints = hints or ["the answer is missing: completion, output, response or answer"]
    elif any(name in ANSWERED for name in names):
        hints = hints or ["the question is missing: prompt, instruction, question or query"]
    forms = "text; prompt and completion; instruction and output; messages; conversations"
    said = f"its columns are {shown}, which make no form of record; {' '.join(hints)}".rstrip("; ")
    return f"{said}{' ' if said.endswith('?') else '. '}Rename them to one of: {forms}"


def _null_column(all_columns: tuple[str, ...], columns: tuple[str, ...]) -> str | None:
    """The first column without whose value the record would have a form."""
    try:
        shape = shape_of(all_columns)
    except FormError:
        return None
    return next((name for name in shape.columns.values() if name not in columns), None)


def _text(record: Mapping[str, Any], shape: Shape) -> Canonical:
    text = text_of(record, shape.columns["text"]).replace("\r\n", "\n")
    used = tuple(shape.columns.values())
    if _HUMAN.match(text):
        if not any(match[1] for match in _ASSISTANT.finditer(text)):
            raise FormError('it begins with "### Human:" and has no "### Assistant:" with an answer; add it, or remove the record')
        return Canonical(GUANACO, used, shape.left_out, {"form": "guanaco", "text": text})
    title = text_of(record, shape.columns["title"], may_be_empty=True) if "title" in shape.columns else ""
    return Canonical(TEXT, used, shape.left_out, {"form": "text", "title": " ".join(title.split()), "text": text.strip("\n")})


def _prompt(record: Mapping[str, Any], shape: Shape) -> Canonical:
    columns = shape.columns
    if any(_is_false(record[name]) for name in shape.left_out if name.strip().lower() == "label"):
        raise FormError("its label is false: an example of what not to say, of which there is nothing to imitate; remove the record")
    prompt, completion = record[columns["prompt"]], record[columns["completion"]]
    if isinstance(prompt, list | tuple) or isinstance(completion, list | tuple):
        if not (isinstance(prompt, list | tuple) and isinstance(completion, list | tuple)):
            raise FormError(
                f"prompt is {said(prompt)} and completion is {said(completion)}; give both as texts, or both as lists of messages"
            )
        return _pair(record, shape)
    left_out = (*shape.left_out, *_some(tools=columns.get("tools")).values())
    content = {
        "form": "completion",
        "prompt": text_of(record, columns["prompt"], may_be_empty=True),
        "completion": text_of(record, columns["completion"]),
    }
    return Canonical(PROMPT, tuple(name for part, name in columns.items() if part != "tools"), left_out, content)


def _is_false(value: Any) -> bool:
    """As JSON or a cell of a csv file writes it; 0 is a class like another."""
    return value is False or (isinstance(value, str) and value.strip().lower() == "false")


def _pair(record: Mapping[str, Any], shape: Shape) -> Canonical:
    """Two lists of messages: one conversation of which only the end is learned."""
    columns = shape.columns
    asked = messages_of(record[columns["prompt"]], columns["prompt"], answered=False)
    answer = messages_of(record[columns["completion"]], columns["completion"])
    if asked.messages[-1]["role"] == "assistant":
        raise FormError("prompt ends with a turn of the assistant; end it with the user's or a tool's, and move what follows to completion")
    if (role := next((one["role"] for one in answer.messages if one["role"] in ("user", "system")), "")) != "":
        raise FormError(f"completion has a turn of the {role}, which is not learned; move what stands before the answer to prompt")
    content: dict[str, Any] = {"form": "chat", "messages": [*asked.messages, *answer.messages], "learn_last": True}
    if asked.messages[-1]["role"] == "tool":
        content["learn_from"] = len(asked.messages)  # else from behind the last question
    if tools := tools_of(record.get(columns.get("tools", ""))):
        content["tools"] = tools
    left_out = tuple(dict.fromkeys((*shape.left_out, *asked.left_out, *answer.left_out)))
    return Canonical(PAIRS, tuple(columns.values()), left_out, content)


def _alpaca(record: Mapping[str, Any], shape: Shape) -> Canonical:
    columns = shape.columns
    instruction = text_of(record, columns["instruction"], may_be_empty="input" in columns)
    given = text_of(record, columns["input"], may_be_empty=True) if "input" in columns else ""
    completion = text_of(record, columns["completion"])
    if not instruction.strip() and not given.strip():
        raise FormError(f"{columns['instruction']} and {columns['input']} are empty; write what is asked, or remove the record")
    system = text_of(record, columns["system"], may_be_empty=True) if "system" in columns else ""
    earlier = _history(record[columns["history"]]) if "history" in columns else []
    used = tuple(columns.values())
    if not system.strip() and not earlier:
        content = {"form": "completion", "instruction": instruction, "input": given, "completion": completion}
        return Canonical(ALPACA if columns["instruction"].lower() == "instruction" else ASKED_AND_ANSWERED, used, shape.left_out, content)
    messages = [{"role": "system", "content": system}] if system.strip() else []
    messages += earlier
    messages.append({"role": "user", "content": "\n\n".join(part for part in (instruction, given) if part.strip())})
    messages.append({"role": "assistant", "content": completion})
    return Canonical("conversations of a question and what comes before it", used, shape.left_out, {"form": "chat", "messages": messages})


def _history(value: Any) -> list[dict[str, str]]:
    """Earlier turns: a list of [question, answer]."""
    if isinstance(value, str):
        try:
            value = json.loads(value or "[]")
        except (ValueError, RecursionError):
            value = None
    pairs = value if isinstance(value, list | tuple) else [None]
    turns = []
    for pair in pairs:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) and text.strip() for text in pair)):
            raise FormError("history is no list of pairs of texts; write it as [[question, answer], ...]")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _chat(record: Mapping[str, Any], shape: Shape) -> Canonical:
    columns = shape.columns
    found = messages_of(record[columns["messages"]], columns["messages"])
    messages = found.messages
    system = text_of(record, columns["system"], may_be_empty=True) if "system" in columns else ""
    if system.strip():
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        elif messages[0]["content"] != system:
            raise FormError(f"{columns['system']} and the conversation's own system turn differ; keep one of them")
    content: dict[str, Any] = {"form": "chat", "messages": messages}
    if tools := tools_of(record.get(columns.get("tools", ""))):
        content["tools"] = tools
    left_out = tuple(dict.fromkeys((*shape.left_out, *found.left_out)))
    return Canonical(SHAREGPT if found.sharegpt else OPENAI, tuple(columns.values()), left_out, content)


_WRITERS = {"text": _text, "prompt": _prompt, "alpaca": _alpaca, "chat": _chat}
