"""What every endpoint does, wherever it runs: a test class gives an endpoint of the tiny model, tuned.

`EndpointContract` uses the client, and POST /invocations, which is all that SageMaker passes on. `HttpContract` in `http_contract` has the
other routes, for endpoints whose port can be reached.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from trimtab.endpoint import Endpoint
from trimtab.errors import EndpointError

QUESTION = {"role": "user", "content": "Who keeps the key of the tower?"}
ORDINARY = {"max_tokens": 8, "temperature": 0}


@dataclass(frozen=True)
class Invoked:
    """An answer as it came: status, headers (names in lower case), bytes."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def refusal(self) -> tuple[int, str]:
        """The status and the server's words."""
        return self.status, str(self.json["error"]["message"])

    @property
    def events(self) -> list[Any]:
        """The server-sent events of a stream, without OpenAI's last."""
        lines = [line.removeprefix("data:").strip() for line in self.body.decode().split("\n\n") if line]
        return [json.loads(line) for line in lines if line != "[DONE]"]


Invoke = Callable[..., Invoked]
"""invoke(body: bytes | dict, *, content_type="application/json", accept="application/json"): POST /invocations as it is, no client."""


def http(
    url: str, body: bytes | dict[str, Any] | None = None, *, key: str | None = None, method: str | None = None, **headers: str
) -> Invoked:
    """Ask with the standard library alone; a refusal is an answer too. Names of headers are written with _ for -."""
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    sent = {name.replace("_", "-"): value for name, value in headers.items()} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"} | sent, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return Invoked(answer.status, {name.lower(): value for name, value in answer.headers.items()}, answer.read())
    except urllib.error.HTTPError as exc:
        with exc:
            return Invoked(exc.code, {name.lower(): value for name, value in exc.headers.items()}, exc.read())


class EndpointContract:
    """Inherit it and give a fixture `endpoint`; where its port cannot be reached, a fixture `invoke` too. `models` can be asked."""

    models: tuple[str, ...] = ("tuned",)

    @pytest.fixture
    def invoke(self, endpoint: Endpoint) -> Invoke:
        def ask(body: bytes | dict[str, Any], *, content_type: str = "application/json", accept: str = "application/json") -> Invoked:
            return http(endpoint.url + "/invocations", body, key=endpoint.api_key, Content_Type=content_type, Accept=accept)

        return ask

    def test_it_is_ready(self, endpoint: Endpoint) -> None:
        assert endpoint.ready()

    def test_the_client_asks_each_model(self, endpoint: Endpoint) -> None:
        answers = [endpoint.chat("Who keeps the key?", model=name) for name in self.models]
        assert all(answers)
        assert len(set(answers)) == len(answers)
        assert endpoint.chat([{"role": "user", "content": "Who keeps the key?"}]) == answers[0]

    def test_the_clients_settings_reach_the_model(self, endpoint: Endpoint) -> None:
        assert endpoint.generate("The keeper", max_new_tokens=2) != endpoint.generate("The keeper", max_new_tokens=9)
        drawn = {endpoint.generate("The keeper", temperature=2.0, seed=seed, max_new_tokens=8) for seed in (1, 1, 2, 3)}
        assert 2 <= len(drawn) <= 3
        assert endpoint.generate("The keeper", temperature=2.0, top_k=1, max_new_tokens=8) == endpoint.generate(
            "The keeper", max_new_tokens=8
        )

    def test_it_speaks_as_tgi_does(self, endpoint: Endpoint, invoke: Invoke) -> None:
        body: dict[str, Any] = {"inputs": "Bread is baked", "parameters": {"max_new_tokens": 5}}
        answer = invoke(body)
        assert answer.status == 200
        assert [list(one) for one in answer.json] == [["generated_text"]]
        text = answer.json[0]["generated_text"]
        assert text == endpoint.generate("Bread is baked", max_new_tokens=5)
        body["parameters"] = {"max_new_tokens": 5, "return_full_text": True, "do_sample": False, "temperature": 0.9, "top_k": 10}
        assert invoke(body).json[0]["generated_text"] == "Bread is baked" + text

    def test_it_streams_as_tgi_does(self, invoke: Invoke) -> None:
        parameters = {"max_new_tokens": 300, "temperature": 1.5, "top_p": 0.9, "top_k": 50, "seed": 7}
        whole = invoke({"inputs": "The keeper", "parameters": parameters}).json[0]["generated_text"]
        answer = invoke({"inputs": "The keeper", "parameters": parameters, "stream": True})
        assert answer.headers["content-type"].startswith("text/event-stream")
        *pieces, last = answer.events
        assert pieces
        assert all(list(one) == ["index", "token", "generated_text", "details"] for one in [*pieces, last])
        assert all(one["generated_text"] is None and one["details"] is None for one in pieces)
        assert [one["index"] for one in pieces] == sorted({one["index"] for one in pieces})
        assert "".join(one["token"]["text"] for one in [*pieces, last]) == whole == last["generated_text"]
        assert last["details"] in (
            {"finish_reason": "length", "generated_tokens": 300, "seed": 7},
            {"finish_reason": "eos_token", "generated_tokens": last["index"], "seed": 7},
        )

    def test_it_takes_openais_bodies_too(self, endpoint: Endpoint, invoke: Invoke) -> None:
        answer = invoke({"messages": [QUESTION], **ORDINARY}).json
        assert (answer["object"], answer["choices"][0]["message"]["role"]) == ("chat.completion", "assistant")
        assert answer["choices"][0]["message"]["content"] == endpoint.chat([QUESTION], max_new_tokens=8)
        answer = invoke({"prompt": ["The keeper", "Bread"], "max_tokens": 4}).json
        assert answer["object"] == "text_completion"
        assert [choice["text"] for choice in answer["choices"]] == [endpoint.generate(p, max_new_tokens=4) for p in ("The keeper", "Bread")]
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]
        assert {choice["finish_reason"] for choice in answer["choices"]} <= {"stop", "length"}
        usage = answer["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert 0 < usage["completion_tokens"] <= 8

    def test_parts_of_a_message_are_one_text(self, invoke: Invoke) -> None:
        parts = [{"type": "text", "text": "Who keeps "}, {"type": "text", "text": "the key of the tower?"}]
        split = invoke({"messages": [{"role": "user", "content": parts}], **ORDINARY}).json
        assert split["choices"] == invoke({"messages": [QUESTION], **ORDINARY}).json["choices"]

    def test_a_stop_text_ends_the_answer_before_it(self, endpoint: Endpoint, invoke: Invoke) -> None:
        free = endpoint.generate("The keeper", max_new_tokens=24)
        stop = free[len(free) // 2 :][:3]
        expected = free[: free.index(stop)]
        assert endpoint.generate("The keeper", max_new_tokens=24, stop=[stop]) == expected
        assert "".join(endpoint.stream("The keeper", chat=False, max_new_tokens=24, stop=[stop])) == expected
        many = invoke({"prompt": ["The keeper", "The keeper"], "max_tokens": 24, "stop": stop}).json
        assert [(choice["text"], choice["finish_reason"]) for choice in many["choices"]] == [(expected, "stop")] * 2
        for name in ("stop", "stop_sequences"):
            last = invoke({"inputs": "The keeper", "parameters": {"max_new_tokens": 24, name: [stop]}, "stream": True}).events[-1]
            assert (last["generated_text"], last["details"]["finish_reason"]) == (expected, "stop_sequence")

    def test_a_stream_brings_the_same_text_in_pieces(self, endpoint: Endpoint) -> None:
        pieces = list(endpoint.stream("The keeper", chat=False, max_new_tokens=1000))
        assert len(pieces) > 2, "tokens of quick steps come together, but not a second's"
        assert "".join(pieces) == endpoint.generate("The keeper", max_new_tokens=1000)
        assert "".join(endpoint.stream([QUESTION], max_new_tokens=8)) == endpoint.chat([QUESTION], max_new_tokens=8)

    def test_a_chats_stream_is_openais(self, invoke: Invoke) -> None:
        answer = invoke({"messages": [QUESTION], **ORDINARY, "stream": True, "stream_options": {"include_usage": True}})
        assert answer.body.endswith(b"data: [DONE]\n\n")
        *pieces, ended, usage = answer.events
        assert {(one["object"], one["id"]) for one in answer.events} == {("chat.completion.chunk", usage["id"])}
        assert pieces[0]["choices"][0]["delta"]["role"] == "assistant"
        assert all("role" not in one["choices"][0]["delta"] for one in pieces[1:])
        assert [one["choices"][0]["finish_reason"] for one in pieces] == [None] * len(pieces)
        assert (ended["choices"][0]["delta"], ended["choices"][0]["finish_reason"]) in (({}, "stop"), ({}, "length"))
        assert (usage["choices"], usage["usage"]["total_tokens"]) == (
            [],
            usage["usage"]["prompt_tokens"] + usage["usage"]["completion_tokens"],
        )
        assert all(one["usage"] is None for one in [*pieces, ended])

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{",
            b"[]",
            b'"text"',
            b"\xff\xfe",
            b'{"inputs": "\\ud800"}',
            b'{"prompt": "\xed\xa0\x80"}',
            b"[" * 100_000,
            b"1" * 5000,
            b"{}",
        ],
        ids=["empty", "cut", "list", "string", "bytes", "surrogate", "raw-surrogate", "deep", "long", "nothing"],
    )
    def test_what_is_no_request_is_refused(self, invoke: Invoke, body: bytes) -> None:
        status, message = invoke(body).refusal
        assert status == 400
        assert message

    @pytest.mark.parametrize(
        ("body", "word"),
        [
            ({"max_tokens": 0}, "max_tokens"),
            ({"max_tokens": -5}, "max_tokens"),
            ({"max_tokens": 100_000}, "context"),
            ({"max_tokens": 10**12}, "max_tokens"),
            ({"max_tokens": 10**400}, "max_tokens"),
            ({"max_tokens": "many"}, "max_tokens"),
            ({"max_tokens": 2.5}, "max_tokens"),
            ({"temperature": -1}, "temperature"),
            ({"temperature": "hot"}, "temperature"),
            ({"top_p": 0}, "top_p"),
            ({"top_p": 1.5}, "top_p"),
            ({"top_k": -2}, "top_k"),
            ({"top_k": 1.5}, "top_k"),
            ({"seed": -1}, "seed"),
            ({"stop": ["a"] * 17}, "stop"),
            ({"n": 3}, "n is not supported"),
            ({"logprobs": True}, "logprobs is not supported"),
            ({"tools": [{"type": "function"}]}, "tools is not supported"),
            ({"messages": []}, "messages"),
            ({"messages": [{"role": "wizard", "content": "a"}]}, "messages.0.role"),
            ({"messages": [{"role": "user"}]}, "messages.0.content"),
            ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
            ({"messages": "hello"}, "messages"),
            ({"messages": [QUESTION] * 4000}, "messages"),
            ({"messages": [{"role": "user", "content": "a" * 3_000_000}]}, "context"),
            ({"messages": [{"role": "user", "content": "ship " * 9000}]}, "context"),
        ],
    )
    def test_wrong_values_are_named(self, invoke: Invoke, body: dict[str, Any], word: str) -> None:
        for stream in (False, True):
            status, message = invoke({"messages": [QUESTION], "stream": stream, **body}).refusal
            assert status == 400
            assert word in message

    @pytest.mark.parametrize(
        ("body", "word"),
        [
            ({"inputs": ""}, "inputs"),
            ({"inputs": ["a", "b"]}, "inputs"),
            ({"parameters": {"max_new_tokens": 0}}, "parameters.max_new_tokens"),
            ({"parameters": {"max_new_tokens": 5000}}, "context"),
            ({"parameters": {"details": True}}, "details is not supported"),
            ({"parameters": {"ignore_eos": True}}, "ignore_eos is not supported"),
            ({"parameters": {"min_tokens": 5}}, "min_tokens is not supported"),
            ({"parameters": {"adapter_id": "a"}}, "adapter_id is not supported"),
            ({"parameters": {"num_return_sequences": 2}}, "num_return_sequences is not supported"),
            ({"parameters": "all"}, "parameters"),
        ],
    )
    def test_tgis_wrong_values_are_named(self, invoke: Invoke, body: dict[str, Any], word: str) -> None:
        status, message = invoke({"inputs": "The keeper", **body}).refusal
        assert status == 400
        assert word in message

    def test_what_changes_nothing_is_accepted(self, invoke: Invoke) -> None:
        neutral = {"n": 1, "frequency_penalty": 0.0, "presence_penalty": 0, "logprobs": False, "user": "u-1", "stream": False, "stop": None}
        answer = invoke({"messages": [QUESTION], **ORDINARY, **neutral, "top_k": -1})
        assert (answer.status, len(answer.json["choices"])) == (200, 1)
        parameters = {
            "max_new_tokens": 3,
            "details": False,
            "watermark": False,
            "repetition_penalty": 1.0,
            "top_k": 0,
            "num_return_sequences": 1,
        }
        assert invoke({"inputs": "The keeper", "parameters": parameters}, accept="*/*").status == 200
        assert invoke({"inputs": "The keeper", "parameters": None}, content_type="text/plain").status == 200, "the body says what it is"

    def test_numbers_too_small_to_compute_with_are_the_likeliest_token(self, invoke: Invoke) -> None:
        likeliest = invoke({"messages": [QUESTION], **ORDINARY}).json["choices"][0]["message"]["content"]
        for own in (
            {"temperature": 1e-46},
            {"temperature": 1e-5},
            {"temperature": 1.0, "top_p": 1e-46},
            {"temperature": 1.0, "top_p": 1e-9},
        ):
            answer = invoke({"messages": [QUESTION], **ORDINARY, "seed": 5, **own})
            assert answer.status == 200, answer.json
            assert answer.json["choices"][0]["message"]["content"] == likeliest

    def test_a_prompt_that_its_writer_made_of_control_tokens_is_a_conversation(self, invoke: Invoke) -> None:
        """As TGI and LMI take `inputs`; in a message and in OpenAI's prompt the same letters are letters."""
        chat = invoke({"messages": [QUESTION], **ORDINARY}).json
        turns = f"<|im_start|>user\n{QUESTION['content']}<|im_end|>\n<|im_start|>assistant\n"
        assert (
            invoke({"inputs": turns, "parameters": {"max_new_tokens": 8}}).json[0]["generated_text"]
            == (chat["choices"][0]["message"]["content"])
        )
        letters = invoke({"prompt": turns, **ORDINARY}).json
        assert letters["usage"]["prompt_tokens"] > chat["usage"]["prompt_tokens"]

    def test_an_unknown_model_is_named_with_those_that_are_there(self, invoke: Invoke) -> None:
        status, message = invoke({"model": "gpt-9", "messages": [QUESTION]}).refusal
        assert status == 404
        assert "'gpt-9'" in message
        assert ", ".join(self.models) in message

    def test_a_body_over_six_megabytes_is_refused(self, invoke: Invoke) -> None:
        status, message = invoke({"inputs": "a" * (6 << 20)}).refusal
        assert status == 413
        assert "6 MB" in message

    def test_it_goes_on_after_an_answer_that_nobody_waits_for(self, endpoint: Endpoint) -> None:
        pieces = endpoint.stream("The keeper", chat=False, max_new_tokens=4000)
        assert next(pieces)
        assert endpoint.ready(timeout=2)
        pieces.close()  # type: ignore[attr-defined]
        began = time.monotonic()
        endpoint.generate("Bread", max_new_tokens=1)
        assert time.monotonic() - began < 10, "4,000 tokens take longer than this"

    def test_many_ask_at_once_and_each_gets_its_own_answer(self, endpoint: Endpoint) -> None:
        prompts = [f"Ship {number} came at dawn and" for number in range(12)]
        alone = [endpoint.generate(prompt, max_new_tokens=6) for prompt in prompts]
        found: dict[str, str] = {}
        threads = [
            threading.Thread(target=lambda p=prompt: found.update({p: endpoint.generate(p, max_new_tokens=6)})) for prompt in prompts
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[prompt] for prompt in prompts] == alone

    def test_the_clients_errors_say_what_to_do(self, endpoint: Endpoint) -> None:
        with pytest.raises(EndpointError, match=r"there is no model 'gpt-9' here; ask for one of: "):
            endpoint.chat("a", model="gpt-9")
        with pytest.raises(EndpointError, match=r"context"):
            endpoint.generate("a", max_new_tokens=1_000_000)
        with pytest.raises(EndpointError, match=r"temperature"):
            endpoint.generate("a", temperature=-1.0)
        with pytest.raises(EndpointError, match="finite"):
            endpoint.generate("a", temperature=float("nan"))
