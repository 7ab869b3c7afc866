"""What may be asked over HTTP, checked before the model sees it: the bodies of TGI's and OpenAI's interfaces.

Sources: "Text Generation Inference" (Messages API, `/generate` parameters) and the OpenAI API reference (`/v1/completions`,
`/v1/chat/completions`). Names that would change the answer and are not supported are refused; others are ignored.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trimtab.errors import EndpointError

MAX_PROMPTS = 256
MAX_MESSAGES = 2048
DEFAULT_NEW_TOKENS = 200

# engines compute in float32, where smaller numbers are 0 or make logits infinite; both name the likeliest token
_COLDEST = 1e-4
_LEAST_SHARE = 1e-6

# what OpenAI's clients send although nobody asked for it, with the value that changes nothing
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "num_return_sequences": (1,),
    "typical_p": (1,),
    "watermark": (False,),
    "best_of": (1,),
    "decoder_input_details": (False,),
    "details": (False,),
    "truncate": (),
    "top_n_tokens": (0,),
    "min_p": (0,),
    "grammar": (),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "min_new_tokens": (0,),
    "adapter_id": (),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "num_beams": (1,),
    "no_repeat_ngram_size": (0,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "add_special_tokens": (True,),
    "prompt_logprobs": (0,),
    "top_logprobs": (0,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
}

_Text = Annotated[str, Field(min_length=1)]
_Limit = Annotated[int, Field(ge=1, lt=2**31)]
_StopText = Annotated[str, Field(min_length=1, max_length=256)]
_Stop = Annotated[str, Field(max_length=256)] | Annotated[list[_StopText], Field(max_length=16)] | None


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for name, neutral in _NEUTRAL.items():
                if values.get(name) is not None and values[name] not in neutral:
                    raise ValueError(f"{name} is not supported here, leave it out")
        return values


class Sampling(_Body):
    """How the next token is drawn: the likeliest, unless a temperature is given."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None  # 0 and -1: all; OpenAI has none, other servers add it as here
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: _Stop = None
    stop_sequences: _Stop = None  # as LMI's clients call it

    @property
    def stops(self) -> list[str]:
        given = [[one] if isinstance(one, str) else one for one in (self.stop, self.stop_sequences) if one]
        return [text for texts in given for text in texts]

    @property
    def drawn_at(self) -> float:
        """The temperature, 0 for the likeliest token."""
        return _felt(self.temperature or 0.0)

    @property
    def share(self) -> float:
        """`top_p`, as small as an engine can compute with."""
        return 1.0 if self.top_p is None else max(self.top_p, _LEAST_SHARE)


class Parameters(Sampling):
    """TGI's. Temperature 0, the likeliest token, unless it is given or `do_sample` is true."""

    max_new_tokens: _Limit | None = None
    do_sample: bool | None = None
    return_full_text: bool | None = None

    @property
    def drawn_at(self) -> float:
        if self.do_sample is False:
            return 0.0
        return _felt(self.temperature if self.temperature is not None else float(bool(self.do_sample)))


class Inputs(_Body):
    """TGI's body of one text to go on with."""

    inputs: _Text
    model: str | None = None
    parameters: Parameters | None = None
    stream: bool | None = None

    @property
    def own(self) -> Parameters:
        return self.parameters or Parameters()


class Part(_Body):
    type: Literal["text"]
    text: str


class Message(_Body):
    role: Literal["system", "user", "assistant"]
    content: str | list[Part]

    def plain(self) -> dict[str, str]:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


class StreamOptions(_Body):
    include_usage: bool | None = None


class _OpenAI(Sampling):
    model: str | None = None
    max_tokens: _Limit | None = None
    max_completion_tokens: _Limit | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def tells_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class Chat(_OpenAI):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


class Completions(_OpenAI):
    prompt: _Text | Annotated[list[_Text], Field(min_length=1, max_length=MAX_PROMPTS)]

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)


def _felt(temperature: float) -> float:
    return temperature if temperature >= _COLDEST else 0.0


_B = TypeVar("_B", bound=_Body)


def parse(kind: type[_B], values: dict[str, Any]) -> _B:
    """The body as a request of that kind. Raises EndpointError naming each thing that is wrong, all at once."""
    try:
        return kind.model_validate(values)
    except ValidationError as exc:
        found = [
            (".".join(str(part) for part in error["loc"]), error["msg"]) for error in exc.errors(include_url=False, include_input=False)
        ]
        raise EndpointError(
            "; ".join(f"{where or 'body'}: {what}" for where, what in found) + ". Correct the body and send it again"
        ) from exc


def decode(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises EndpointError for anything else."""
    try:
        values = json.loads(body.decode())
        if b"\\u" in body:
            json.dumps(values, ensure_ascii=False).encode()  # half of a surrogate pair is JSON, but no text
    except (ValueError, RecursionError) as exc:
        reason = f"{exc.msg} at character {exc.pos}" if isinstance(exc, json.JSONDecodeError) else type(exc).__name__
        raise EndpointError(f"the body is not JSON ({reason}): send one JSON object in UTF-8") from exc
    if not isinstance(values, dict):
        raise EndpointError("the body is JSON but not an object: send {...}")
    return values
