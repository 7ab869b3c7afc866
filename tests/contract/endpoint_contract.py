"""What every endpoint does, wherever it runs: a test class gives the address of a server of the tiny model and its adapter."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from typing import Any

import pytest

from trimtab.endpoint import Endpoint
from trimtab.errors import EndpointError

QUESTION = {"role": "user", "content": "Who keeps the key of the tower?"}
ORDINARY = {"max_tokens": 8, "temperature": 0}


def ask(endpoint: Endpoint, path: str, body: bytes | dict[str, Any] | None = None) -> tuple[int, Any]:
    """Status and JSON of an answer, also of a refusal."""
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    request = urllib.request.Request(endpoint.url + path, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, json.load(exc)


def refusal(endpoint: Endpoint, path: str, body: bytes | dict[str, Any]) -> tuple[int, str]:
    status, answer = ask(endpoint, path, body)
    return status, answer["error"]["message"]


class EndpointContract:
    """Inherit it and give a fixture `endpoint`: base and adapter of the tiny model, its own name tiny-lighthouse."""

    def test_it_is_ready_and_lists_its_models(self, endpoint: Endpoint) -> None:
        assert ask(endpoint, "/ping")[0] == 200
        assert endpoint.ready()
        assert endpoint.models() == ["tuned", "base", "tiny-lighthouse"]

    def test_the_client_asks_both_models(self, endpoint: Endpoint) -> None:
        tuned, base = endpoint.chat("Who keeps the key?"), endpoint.chat("Who keeps the key?", model="base")
        assert tuned
        assert base
        assert tuned != base
        assert endpoint.chat([{"role": "user", "content": "Who keeps the key?"}], model="tuned") == tuned
        assert endpoint.generate("The keeper", model="base") == endpoint.generate("The keeper", model="tiny-lighthouse")
        assert endpoint.generate("The keeper", max_new_tokens=2) != endpoint.generate("The keeper", max_new_tokens=9)
        drawn = {endpoint.generate("The keeper", temperature=2.0, seed=seed, max_new_tokens=8) for seed in (1, 1, 2, 3)}
        assert 2 <= len(drawn) <= 3

    def test_invocations_speak_as_tgi_does(self, endpoint: Endpoint) -> None:
        body = {"inputs": "Bread is baked", "parameters": {"max_new_tokens": 5}}
        status, answer = ask(endpoint, "/invocations", body)
        assert status == 200
        assert [list(one) for one in answer] == [["generated_text"]]
        text = answer[0]["generated_text"]
        assert text == endpoint.generate("Bread is baked", max_new_tokens=5)
        body["parameters"] = {"max_new_tokens": 5, "return_full_text": True, "do_sample": False, "temperature": 0.9}
        assert ask(endpoint, "/invocations", body)[1][0]["generated_text"] == "Bread is baked" + text

    def test_invocations_take_a_conversation_too(self, endpoint: Endpoint) -> None:
        body = {"messages": [QUESTION], **ORDINARY}
        ours, theirs = ask(endpoint, "/invocations", body)[1], ask(endpoint, "/v1/chat/completions", body)[1]
        assert ours["choices"] == theirs["choices"]
        assert ours["choices"][0]["message"]["role"] == "assistant"

    def test_openai_answers_are_complete(self, endpoint: Endpoint) -> None:
        status, answer = ask(endpoint, "/v1/completions", {"model": "base", "prompt": ["The keeper", "Bread"], "max_tokens": 4})
        assert status == 200
        assert (answer["object"], answer["model"]) == ("text_completion", "base")
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]
        assert {choice["finish_reason"] for choice in answer["choices"]} <= {"stop", "length"}
        usage = answer["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert 0 < usage["completion_tokens"] <= 8

    def test_parts_of_a_message_are_one_text(self, endpoint: Endpoint) -> None:
        parts = [{"type": "text", "text": "Who keeps "}, {"type": "text", "text": "the key of the tower?"}]
        whole = ask(endpoint, "/v1/chat/completions", {"messages": [QUESTION], **ORDINARY})[1]
        split = ask(endpoint, "/v1/chat/completions", {"messages": [{"role": "user", "content": parts}], **ORDINARY})[1]
        assert whole["choices"] == split["choices"]

    def test_a_stop_text_ends_the_answer_before_it(self, endpoint: Endpoint) -> None:
        free = endpoint.generate("The keeper", max_new_tokens=24)
        stop = free[len(free) // 2 :][:3]
        expected = free[: free.index(stop)]
        assert endpoint.generate("The keeper", max_new_tokens=24, stop=[stop]) == expected
        _, many = ask(endpoint, "/v1/completions", {"prompt": ["The keeper", "The keeper"], "max_tokens": 24, "stop": stop})
        assert [(choice["text"], choice["finish_reason"]) for choice in many["choices"]] == [(expected, "stop")] * 2
        assert "".join(self._stream(endpoint, {"prompt": "The keeper", "max_tokens": 24, "stop": [stop]})) == expected

    def test_a_stream_brings_the_same_text_in_pieces(self, endpoint: Endpoint) -> None:
        pieces = self._stream(endpoint, {"prompt": "The keeper", "max_tokens": 20})
        assert len(pieces) > 2
        assert "".join(pieces) == endpoint.generate("The keeper", max_new_tokens=20)

    @staticmethod
    def _stream(endpoint: Endpoint, body: dict[str, Any]) -> list[str]:
        data = json.dumps({**body, "stream": True}).encode()
        with urllib.request.urlopen(urllib.request.Request(endpoint.url + "/v1/completions", data=data), timeout=60) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            lines = [line.decode().removeprefix("data: ").strip() for line in answer if line.strip()]
        assert lines[-1] == "[DONE]"
        events = [json.loads(line)["choices"][0] for line in lines[:-1]]
        assert [event["finish_reason"] for event in events[:-1]] == [None] * (len(events) - 1)
        assert events[-1]["finish_reason"] in ("stop", "length")
        return [event["text"] for event in events if event["text"]]

    @pytest.mark.parametrize("path", ["/invocations", "/v1/completions", "/v1/chat/completions"])
    @pytest.mark.parametrize(
        "body",
        [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b'{"inputs": "\\ud800", "prompt": "a"}', b"[" * 100_000, b"1" * 5000, b"{}"],
        ids=["empty", "cut", "list", "string", "bytes", "surrogate", "deep", "long", "nothing"],
    )
    def test_what_is_no_request_is_refused(self, endpoint: Endpoint, path: str, body: bytes) -> None:
        status, message = refusal(endpoint, path, body)
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
            ({"seed": -1}, "seed"),
            ({"n": 3}, "n is not supported"),
            ({"tools": [{"type": "function"}]}, "tools is not supported"),
            ({"messages": []}, "messages"),
            ({"messages": [{"role": "wizard", "content": "a"}]}, "messages.0.role"),
            ({"messages": [{"role": "user"}]}, "messages.0.content"),
            ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
            ({"messages": "hello"}, "messages"),
            ({"messages": [{"role": "user", "content": "ship " * 9000}]}, "context"),
        ],
    )
    @pytest.mark.parametrize("stream", [False, True])
    def test_wrong_values_are_named(self, endpoint: Endpoint, body: dict[str, Any], word: str, stream: bool) -> None:
        status, message = refusal(endpoint, "/v1/chat/completions", {"messages": [QUESTION], "stream": stream, **body})
        assert status == 400
        assert word in message

    def test_what_changes_nothing_is_accepted(self, endpoint: Endpoint) -> None:
        neutral = {"n": 1, "frequency_penalty": 0.0, "presence_penalty": 0, "logprobs": False, "user": "u-1", "stream": False, "stop": None}
        status, answer = ask(endpoint, "/v1/chat/completions", {"messages": [QUESTION], **ORDINARY, **neutral})
        assert (status, len(answer["choices"])) == (200, 1)

    def test_unknown_models_paths_and_methods(self, endpoint: Endpoint) -> None:
        status, message = refusal(endpoint, "/v1/chat/completions", {"model": "gpt-9", "messages": [QUESTION]})
        assert status == 404
        assert "tuned, base, tiny-lighthouse" in message
        assert ask(endpoint, "/v1/nothing")[0] == 404
        assert ask(endpoint, "/invocations")[0] == 405

    def test_a_body_over_six_megabytes_is_refused(self, endpoint: Endpoint) -> None:
        status, message = refusal(endpoint, "/invocations", {"inputs": "a" * (6 << 20)})
        assert status == 413
        assert "6 MB" in message

    def test_it_pings_while_it_works_and_drops_what_nobody_waits_for(self, endpoint: Endpoint) -> None:
        body = json.dumps({"prompt": "The keeper", "max_tokens": 4000, "temperature": 5, "stream": True}).encode()
        with urllib.request.urlopen(urllib.request.Request(endpoint.url + "/v1/completions", data=body), timeout=60) as answer:
            answer.readline()
            assert endpoint.ready(timeout=2)
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
        with pytest.raises(EndpointError, match=r"answered 404: there is no model 'gpt-9' here; ask for one of: tuned"):
            endpoint.chat("a", model="gpt-9")
        with pytest.raises(EndpointError, match=r"answered 400: .*context"):
            endpoint.generate("a", max_new_tokens=1_000_000)
        with pytest.raises(EndpointError, match=r"answered 400: .*temperature"):
            endpoint.generate("a", temperature=-1.0)
        with pytest.raises(EndpointError, match="finite"):
            endpoint.generate("a", temperature=float("nan"))
