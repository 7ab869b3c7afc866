"""What the containers want in `/invocations`, and what they answer: one meaning in three forms. Pure.

trimtab: OpenAI's bodies and TGI's. openai (vLLM): OpenAI's, told apart by their members. tgi (LMI, TGI): `inputs` with `parameters`, chat.
Source: TGI's HTTP API reference; "LMI handlers Inference API Schema" (DJL Serving); OpenAI API reference.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trimtab.errors import EndpointError

_REASONS = {"eos_token": "stop", "stop_sequence": "stop", "length": "length"}
_BACK = {"stop": "eos_token", "length": "length"}
_SAME = ("temperature", "top_p", "top_k", "seed")


def dialect(container: str) -> str:
    return {"trimtab": "trimtab", "vllm": "openai"}.get(container, "tgi")


def is_chat(body: Mapping[str, Any]) -> bool:
    return "messages" in body


def asked(body: Mapping[str, Any], container: str) -> dict[str, Any]:
    """The body as the container takes it."""
    form = dialect(container)
    if form == "trimtab":
        return dict(body)
    if is_chat(body):
        return {name: value for name, value in body.items() if name != "model" or form == "openai"}
    if form == "openai" and "inputs" in body:
        return _to_openai(body)
    if form == "tgi" and "prompt" in body:
        return _to_tgi(body, "stop_sequences" if container == "lmi" else "stop")
    return dict(body)


def answered(answer: Any, body: Mapping[str, Any], container: str) -> Any:
    """The answer to `body` in the form that belongs to it. Raises EndpointError for one in no known form."""
    form = dialect(container)
    if form == "openai" and "inputs" in body:
        return [{"generated_text": _member(answer, "choices", 0, "text")}]
    if form == "tgi" and "prompt" in body:
        first = answer[0] if isinstance(answer, list) and answer else answer
        return {"object": "text_completion", "model": body.get("model", ""), "choices": [_choice(first)]}
    return answer


def event(given: dict[str, Any], body: Mapping[str, Any], container: str) -> dict[str, Any] | None:
    """An event of a stream in the form that belongs to `body`; None for one that says nothing."""
    form = dialect(container)
    if form == "openai" and "inputs" in body:
        return _to_token(given)
    if form == "tgi" and "prompt" in body and "choices" not in given:
        token = given.get("token") or {}
        text = "" if token.get("special") else str(token.get("text", ""))
        over = given.get("generated_text") is not None
        reason = _REASONS.get(str((given.get("details") or {}).get("finish_reason")), "stop") if over else None
        choice = {"index": 0, "text": text, "finish_reason": reason}
        return {"object": "text_completion", "model": body.get("model", ""), "choices": [choice]}
    return given


def event_lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """A stream of JSON lines, as LMI sends them, as one of server-sent events; one of such events as it is."""
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield _as_event(line)
    if rest.strip():
        yield _as_event(rest)


def _as_event(line: bytes) -> bytes:
    return (b"data:" + line if line.startswith(b"{") else line) + b"\n"


def _to_tgi(body: Mapping[str, Any], stop: str) -> dict[str, Any]:
    """A completion's body as TGI's. It takes no temperature of 0 and no top_p of 1: both mean that it is left out."""
    prompt = body["prompt"]
    if not isinstance(prompt, str):
        raise EndpointError("this container answers one prompt at a time: ask for each by itself")
    sampled = float(body.get("temperature") or 0) > 0
    found: dict[str, Any] = {"max_new_tokens": body.get("max_tokens"), "do_sample": sampled, "details": True}
    if sampled:
        found |= {name: body[name] for name in _SAME if body.get(name) is not None and not (name == "top_p" and body[name] >= 1)}
    if given := body.get("stop"):
        found[stop] = [given] if isinstance(given, str) else list(given)
    parameters = {name: value for name, value in found.items() if value is not None}
    return {"inputs": prompt, "parameters": parameters, **({"stream": True} if body.get("stream") else {})}


def _to_openai(body: Mapping[str, Any]) -> dict[str, Any]:
    """TGI's body as a completion's."""
    given = dict(body.get("parameters") or {})
    found: dict[str, Any] = {"prompt": body["inputs"], "max_tokens": given.get("max_new_tokens")}
    found |= {name: given[name] for name in _SAME if given.get(name) is not None}
    if not given.get("do_sample", "temperature" in given):
        found["temperature"] = 0
    found |= {"stop": given.get("stop") or given.get("stop_sequences"), "stream": True if body.get("stream") else None}
    return {name: value for name, value in found.items() if value is not None}


def _choice(answer: Any) -> dict[str, Any]:
    details = (answer.get("details") or {}) if isinstance(answer, dict) else {}
    reason = _REASONS.get(str(details.get("finish_reason")), "stop")
    return {"index": 0, "text": _member(answer, "generated_text"), "finish_reason": reason}


def _to_token(given: Mapping[str, Any]) -> dict[str, Any] | None:
    choices = given.get("choices")
    if not choices:
        return None
    reason = choices[0].get("finish_reason")
    token = {"id": 0, "text": choices[0].get("text", ""), "logprob": None, "special": False}
    details = {"finish_reason": _BACK.get(reason, reason)} if reason else None
    return {"index": 0, "token": token, "generated_text": None, "details": details}


def _member(answer: Any, *path: Any) -> Any:
    for part in path:
        try:
            answer = answer[part]
        except (KeyError, IndexError, TypeError) as exc:
            shown = json.dumps(answer, default=str)[:200]
            raise EndpointError(f"the container answered {shown}, without {path[-1]}: is  container=...  the one that runs there?") from exc
    return answer
