"""What an endpoint does whose port can be reached: OpenAI's routes, the key, what it counts."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from contract.endpoint_contract import ORDINARY, QUESTION, EndpointContract, Invoked, http
from trimtab.endpoint import Endpoint

ROUTES = ("/invocations", "/v1/chat/completions", "/v1/completions", "/v1/models", "/metrics")


def ask(endpoint: Endpoint, path: str, body: bytes | dict[str, Any] | None = None, **options: Any) -> Invoked:
    return http(endpoint.url + path, body, **{"key": endpoint.api_key, **options})


def counted(endpoint: Endpoint) -> dict[str, float]:
    """What /metrics says: each sample by its name, with its labels."""
    lines = ask(endpoint, "/metrics").body.decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))}


def wait_until_free(endpoint: Endpoint, seconds: float = 10.0) -> None:
    """Until nothing runs and nothing waits."""
    deadline = time.monotonic() + seconds
    while (now := counted(endpoint))["trimtab_running"] or now["trimtab_waiting"]:
        assert time.monotonic() < deadline, f"slots are still taken after {seconds} s: {now}"
        time.sleep(0.05)


class HttpContract(EndpointContract):
    """Inherit it as `EndpointContract`. `listed` are all names of its models."""

    listed: tuple[str, ...] = ("tuned",)

    def test_it_lists_its_models(self, endpoint: Endpoint) -> None:
        assert ask(endpoint, "/ping").status == 200
        assert endpoint.models() == list(self.listed)

    def test_all_names_of_a_model_answer_as_it_does(self, endpoint: Endpoint) -> None:
        answers = {name: endpoint.generate("The keeper", model=name, max_new_tokens=6) for name in self.listed}
        assert len(set(answers.values())) == len(self.models)
        assert ask(endpoint, "/v1/completions", {"prompt": "The keeper", "model": ""}).json["model"] == self.models[0]

    def test_openais_routes_answer_as_invocations_do(self, endpoint: Endpoint, invoke: Any) -> None:
        for path, body in (
            ("/v1/chat/completions", {"messages": [QUESTION], **ORDINARY}),
            ("/v1/completions", {"prompt": "A", **ORDINARY}),
        ):
            answer, same = ask(endpoint, path, body).json, invoke(body).json
            assert (answer["choices"], answer["usage"]) == (same["choices"], same["usage"])
            assert answer["id"] != same["id"]

    @pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
    @pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}"])
    def test_openais_routes_refuse_what_is_no_request(self, endpoint: Endpoint, path: str, body: bytes) -> None:
        assert ask(endpoint, path, body).refusal[0] == 400

    def test_unknown_paths_and_methods(self, endpoint: Endpoint) -> None:
        status, message = ask(endpoint, "/v1/nothing").refusal
        assert status == 404
        assert "/v1/completions" in message
        assert ask(endpoint, "/invocations").refusal == (405, "/invocations takes POST, not GET")
        assert ask(endpoint, "/ping", b"{}").refusal == (405, "/ping takes GET, not POST")
        assert ask(endpoint, "/ping", method="HEAD").status == 405

    def test_every_route_but_ping_wants_the_key(self, endpoint: Endpoint) -> None:
        if endpoint.api_key is None:
            pytest.skip("an endpoint that asks for none")
        assert ask(endpoint, "/ping", key=None).status == 200
        for path in (*ROUTES, "/v1/nothing", "/"):
            for body in (None, b"{}"):
                for wrong in (None, "", "wrong", endpoint.api_key[:-1], endpoint.api_key + "a", endpoint.api_key.swapcase()):
                    answer = ask(endpoint, path, body, key=wrong)
                    assert answer.refusal[0] == 401, (path, wrong)
                    assert answer.headers["www-authenticate"] == "Bearer"
        for scheme in ("Basic ", "", "Bearer: ", "Bearer Bearer "):
            assert ask(endpoint, "/v1/models", key=None, Authorization=scheme + endpoint.api_key).status == 401
        assert ask(endpoint, "/v1/models", key=None, Authorization=f"bearer {endpoint.api_key}").status == 200
        assert ask(endpoint, "/ping", b"{}", key=None).status == 401, "only GET /ping is open"

    def test_what_asks_nothing_has_no_body(self, endpoint: Endpoint) -> None:
        for path in ("/ping", "/v1/models"):
            assert ask(endpoint, path, b"a" * (1 << 20), method="GET").refusal[0] == 413
            assert ask(endpoint, path, b"{}", method="GET").status == 200

    def test_it_counts(self, endpoint: Endpoint) -> None:
        wait_until_free(endpoint)
        before = counted(endpoint)
        answer = ask(endpoint, "/v1/completions", {"prompt": "The keeper", "max_tokens": 5}).json
        ask(endpoint, "/v1/completions", b"{")
        ask(endpoint, "/v1/../etc/passwd")
        after = counted(endpoint)

        def grown(name: str) -> float:
            return after[name] - before.get(name, 0)

        assert grown('trimtab_requests_total{route="/v1/completions",status="200"}') == 1
        assert grown('trimtab_requests_total{route="/v1/completions",status="400"}') == 1
        assert grown('trimtab_requests_total{route="other",status="404"}') == 1
        assert grown("trimtab_tokens_in_total") == answer["usage"]["prompt_tokens"]
        assert grown("trimtab_tokens_out_total") == answer["usage"]["completion_tokens"]
        assert grown("trimtab_time_to_first_token_seconds_count") == 1
        assert grown('trimtab_time_to_first_token_seconds_bucket{le="+Inf"}') == 1
        assert 0 < grown("trimtab_time_to_first_token_seconds_sum") < 60
        assert (after["trimtab_running"], after["trimtab_waiting"], after["trimtab_ready"]) == (0, 0, 1)
        assert 0 <= after["trimtab_cache_share"] <= 1

    def test_what_it_counts_is_in_prometheus_form(self, endpoint: Endpoint) -> None:
        answer = ask(endpoint, "/metrics")
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        text = answer.body.decode()
        assert text.endswith("\n")
        sample = r'trimtab_[a-z_]+(\{[a-z]+="[^"\n]*"(,[a-z]+="[^"\n]*")*\})? [0-9.e+-]+'
        for line in text.splitlines():
            assert re.fullmatch(rf"# (HELP|TYPE) trimtab_[a-z_]+ .+|{sample}", line), line
