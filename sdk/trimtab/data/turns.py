"""The turns of a conversation and its tools, as records write them, in the form that transformers' chat templates take. Pure."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response"), "tool"),
    "function_call": "function_call",
}
"""What records call a role, and what chat templates call it, but for `function_call`: an assistant's turn that calls tools."""

_ROLE_TURN = ("role", "content", "name", "tool_calls", "tool_call_id", "function_call", "weight")
_FROM_TURN = ("from", "value", "weight")
_NEAR = 0.75  # how like a known name an unknown one must be to be taken for a slip of it: `form` and `from` are
_WORDS = {str: "a text", bool: "true or false", int: "a number", float: "a number", type(None): "null", dict: "an object"}


class FormError(ValueError):
    """What is wrong with a record, and what to do. The reader adds where it stands."""


def nearest(name: str, right: Iterable[str]) -> str | None:
    """The right name of which `name` is a slip, or None: alike, and about as long (`story` is no slip of `history`)."""
    more = 1 if len(name) < 6 else 2
    found = difflib.get_close_matches(name, [word for word in right if abs(len(word) - len(name)) <= more], n=1, cutoff=_NEAR)
    return found[0] if found else None


@dataclass(frozen=True)
class Turns:
    """`messages` as chat templates take them; `left_out` the unread names as "messages.id"; `sharegpt`: written as from and value."""

    messages: list[dict[str, Any]]
    left_out: tuple[str, ...]
    sharegpt: bool


def said(value: Any) -> str:
    """The kind of a value, in words."""
    return _WORDS.get(type(value), "a list" if isinstance(value, list | tuple) else f"of type {type(value).__name__}")


def text_of(record: Mapping[str, Any], column: str, *, may_be_empty: bool = False) -> str:
    """The text in a column, as it stands. Raises FormError for anything else, and for nothing but white space unless that is allowed."""
    value = record[column]
    if not isinstance(value, str):
        raise FormError(f"{column} is {said(value)} and not a text; write it as a text in quotes")
    if not may_be_empty and not value.strip():
        raise FormError(f"{column} is empty; write its text, or remove the record")
    return value


def messages_of(value: Any, column: str, *, answered: bool = True) -> Turns:
    """The turns in a column. With `answered` at least one must be the assistant's; without, whose they are is not looked at.

    Raises FormError naming the turn, counted from 1.
    """
    turns = _parsed(value, column)
    if not isinstance(turns, list | tuple):
        raise FormError(f"{column} is {said(turns)} and not a list of turns; write it as a list of objects with role and content")
    if not turns:
        raise FormError(f"{column} is empty; write its turns, or remove the record")
    messages, left_out, sharegpt = [], dict[str, None](), False
    for number, turn in enumerate(turns, start=1):
        try:
            if not isinstance(turn, Mapping):
                raise FormError(f"it is {said(turn)} and not an object with role and content; write it as one")
            shape = _turn_shape(tuple(name for name, part in turn.items() if part is not None or name in ("content", "value")))
            sharegpt = sharegpt or shape.sharegpt
            left_out |= dict.fromkeys(f"{column}.{name}" for name in shape.left_out)
            message, unread = _from_value(turn) if shape.sharegpt else _role_content(turn)
            left_out |= dict.fromkeys(f"{column}.{name}" for name in unread)
            messages.append(message)
        except FormError as exc:
            raise FormError(f"turn {number} of {column}: {exc}") from None
    if answered and not any(message["role"] == "assistant" for message in messages):
        raise FormError(f"{column} has no turn of the assistant, so there is nothing to learn; add the answer, or remove the record")
    return Turns(messages, tuple(left_out), sharegpt)


def tools_of(value: Any) -> list[dict[str, Any]]:
    """The tools of a conversation: a list, or its JSON, of `{"type": "function", "function": {...}}` or of the functions alone."""
    if value is None or value == "":
        return []
    tools = _parsed(value, "tools")
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise FormError("tools is no list of objects; write each as an object with name, description and parameters")
    found = []
    for number, tool in enumerate(tools, start=1):
        function = tool.get("function") if "function" in tool else tool
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise FormError(f"tool {number} has no name; write each tool as an object with name, description and parameters")
        found.append(dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)})
    return found


@dataclass(frozen=True)
class _Shape:
    sharegpt: bool
    left_out: tuple[str, ...]


@functools.lru_cache(maxsize=1024)
def _turn_shape(names: tuple[str, ...]) -> _Shape:
    known = _FROM_TURN if "from" in names or ("value" in names and "role" not in names) else _ROLE_TURN
    others = tuple(name for name in names if name not in known)
    for name in others:
        absent = [word for word in (*_ROLE_TURN, *_FROM_TURN) if word not in names]
        if near := nearest(name, absent):
            raise FormError(f"there is no {name!r}; did you mean {near}? Rename it, or remove it")
    for needed in known[: 1 if known is _ROLE_TURN else 2]:
        if needed not in names:
            raise FormError(f"it has no {needed} (it has: {', '.join(names) or 'nothing'}); write {known[0]} and {known[1]}")
    return _Shape(known is _FROM_TURN, others)


def _role(name: Any, column: str) -> str:
    """One of the values of `ROLES`."""
    if not isinstance(name, str):
        raise FormError(f"its {column} is {said(name)} and not a text; write one of user, assistant, system, tool")
    role = ROLES.get(name) or ROLES.get(name.strip().lower())
    if role is None:
        near = difflib.get_close_matches(name.strip().lower(), ROLES, n=1)
        raise FormError(
            f"there is no role {name[:40]!r}; " + (f"did you mean {near[0]}?" if near else "roles are user, assistant, system, tool")
        )
    return role


_Message = tuple[dict[str, Any], list[str]]  # as templates take it, and the names that were not read


def _from_value(turn: Mapping[str, Any]) -> _Message:
    _refuse_weight(turn)
    role, content = _role(turn["from"], "from"), _content(turn["value"], "value")
    if role == "function_call":
        calls = _parsed(content, "value")
        found, unread = _calls(calls if isinstance(calls, list | tuple) else [calls], "value")
        return {"role": "assistant", "content": "", "tool_calls": found}, unread
    _refuse_empty(role, content)
    return {"role": role, "content": content}, []


def _role_content(turn: Mapping[str, Any]) -> _Message:
    _refuse_weight(turn)
    role = _role(turn["role"], "role")
    if role == "function_call":
        raise FormError("there is no role 'function_call' beside content; write an assistant's turn with tool_calls")
    if turn.get("tool_calls") and turn.get("function_call"):
        raise FormError("it has tool_calls and function_call, which are two names of the same; keep one of them")
    calls = turn.get("tool_calls") or ([{"function": turn["function_call"]}] if turn.get("function_call") else None)
    content = turn.get("content")
    if calls is not None and role != "assistant":
        raise FormError(f"a turn of the {role} cannot call tools; give it the role assistant")
    if content is None and calls is None:
        raise FormError("its content is null; write its text, or remove the record" if "content" in turn else "it has no content; write it")
    unread: list[str] = []
    message: dict[str, Any] = {"role": role, "content": "" if content is None else _content(content, "content")}
    if calls is None:
        _refuse_empty(role, message["content"])
    else:
        message["tool_calls"], unread = _calls(calls, "tool_calls")
    for name in ("name", "tool_call_id"):
        if (value := turn.get(name)) is not None:
            if not isinstance(value, str):
                raise FormError(f"its {name} is {said(value)} and not a text; write it in quotes")
            message[name] = value
    return message, unread


def _refuse_weight(turn: Mapping[str, Any]) -> None:
    if turn.get("weight") not in (None, 1):
        raise FormError("its weight is not 1: every turn of the assistant is learned; put what is not to be learned into another role")


def _refuse_empty(role: str, content: str) -> None:
    """What a tool or a system says may be empty."""
    if role in ("user", "assistant") and not content.strip():
        raise FormError(f"what the {role} says is empty; write it, or remove the record")


def _content(value: Any, column: str) -> str:
    """A text, or the texts of a list of content parts, joined."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple):
        raise FormError(f"its {column} is {said(value)} and not a text; write it as a text in quotes")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "input_text", "output_text"):
            what = f"a part of type {kind}" if isinstance(kind, str) else said(part)
            raise FormError(f"its {column} holds {what}, and only text is learned; remove that part or the record")
        if not isinstance(part.get("text"), str):
            raise FormError(f"a part of its {column} has no text; write it, or remove that part")
        texts.append(part["text"])
    return "".join(texts)


def _calls(value: Any, column: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Calls with their arguments as objects, as templates want them (many records hold them as JSON in a text), and the names in `column`
    that were not read."""
    if not isinstance(value, list | tuple) or not value:
        raise FormError("its tool_calls is no list of calls; write each as an object with function: name and arguments")
    calls, unread = [], dict[str, None]()
    for call in value:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise FormError("a tool call has no name; write it as an object with function: name and arguments")
        if "arguments" not in function and "parameters" in function:
            raise FormError("a tool call has parameters and no arguments; rename them arguments")
        arguments = function.get("arguments")
        arguments = {} if arguments is None or arguments == "" else _parsed(arguments, "the arguments of a tool call")
        if not isinstance(arguments, Mapping):
            raise FormError(f"the arguments of a tool call are {said(arguments)} and not an object; write them as one")
        if (key := call.get("id")) is not None and not isinstance(key, str):
            raise FormError(f"the id of a tool call is {said(key)} and not a text; write it in quotes")
        if function is not call:
            unread |= dict.fromkeys(f"{column}.function.{name}" for name in _unread(function, ("name", "arguments")))
        read = ("id", "type", "function") if function is not call else ("id", "type", "name", "arguments")
        unread |= dict.fromkeys(f"{column}.{name}" for name in _unread(call, read))
        kept = {} if key is None else {"id": key}
        calls.append({**kept, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}})
    return calls, list(unread)


def _unread(found: Mapping[str, Any], read: Sequence[str]) -> list[str]:
    return [name for name, value in found.items() if value is not None and name not in read]


def _parsed(value: Any, what: str) -> Any:
    """`value`, or what it holds as JSON when it is a text (a cell of a csv file always is)."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=_no_constant)
    except (ValueError, RecursionError) as exc:
        raise FormError(f"{what} is a text and not JSON; write a list of objects") from exc


def _no_constant(name: str) -> Any:
    raise ValueError(name)
