"""OpenAI's shapes: chat requests read, answers, chunks and errors written.

Knows which fields are supported, refused or ignored; docs/http-api.md lists them all.  Knows
neither HTTP nor the engine.  Pure; any thread.
"""

import time
from dataclasses import dataclass, replace
from typing import Any

from agent_memory.errors import BadRequest, RequestError, UnsupportedParameter
from agent_memory.request import SamplingParams
from agent_memory.server.body import Fields

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
MAX_STOPS = 4
MAX_STOP_CHARS = 200
MAX_SEED = 2**63 - 1

# Fields that would change the answer, with the values that leave it as it is.
NOT_BUILT: dict[str, tuple[object, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "web_search_options": (),
}
NOT_BUILT_IN_MESSAGES: dict[str, tuple[object, ...]] = {
    "audio": (),
    "function_call": (),
    "tool_calls": ([],),
}


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """`model` None: whichever serves.  `sampling` holds only what the client chose."""

    model: str | None
    messages: list[dict[str, str]]
    max_tokens: int | None
    stop: tuple[str, ...]
    sampling: dict[str, Any]
    stream: bool
    include_usage: bool

    def sampling_over(self, defaults: SamplingParams) -> SamplingParams:
        return replace(defaults, **self.sampling)


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int

    def wire(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def parse_chat(values: dict[str, Any]) -> ChatRequest:
    """Raises BadRequest naming the field."""
    body = Fields(values)
    _refuse_not_built(body, NOT_BUILT)
    short = body.integer("max_tokens", 1)
    long = body.integer("max_completion_tokens", 1)
    return ChatRequest(
        model=body.text("model"),
        messages=_messages(body),
        max_tokens=short if long is None else long,
        stop=_stop(body),
        sampling=_sampling(body),
        stream=body.flag("stream"),
        include_usage=body.below("stream_options").flag("include_usage"),
    )


def _refuse_not_built(fields: Fields, table: dict[str, tuple[object, ...]]) -> None:
    for name, harmless in table.items():
        value = fields.get(name)
        if value is not None and not any(_same(value, other) for other in harmless):
            raise UnsupportedParameter(fields.place(name))


def _same(value: object, other: object) -> bool:
    """Equal as JSON, where true is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _sampling(body: Fields) -> dict[str, Any]:
    chosen = {
        "temperature": body.number("temperature", 0, 2),
        "top_p": body.number("top_p", 0, 1, open_low=True),
        "top_k": body.integer("top_k", 0),
        "min_p": body.number("min_p", 0, 1),
        "seed": body.integer("seed", -MAX_SEED - 1, MAX_SEED),
    }
    return {name: value for name, value in chosen.items() if value is not None}


def _stop(body: Fields) -> tuple[str, ...]:
    value = body.get("stop")
    stops = [] if value is None else value if isinstance(value, list) else [value]
    fits = len(stops) <= MAX_STOPS and all(
        isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_CHARS for stop in stops
    )
    if not fits:
        body.refuse(
            "stop", f"a string of 1 to {MAX_STOP_CHARS} characters, or a list of up to {MAX_STOPS}"
        )
    return tuple(stops)


def _messages(body: Fields) -> list[dict[str, str]]:
    items = body.items("messages")
    if not items:
        body.refuse("messages", "a list of at least one message")
    return [_message(item, f"messages[{n}]") for n, item in enumerate(items)]


def _message(item: object, place: str) -> dict[str, str]:
    message = _object(item, place)
    _refuse_not_built(message, NOT_BUILT_IN_MESSAGES)
    role = message.text("role")
    if role not in ROLES:
        message.refuse("role", "one of " + ", ".join(ROLES))
    return {"role": ROLES[role], "content": _content(message)}


def _content(message: Fields) -> str:
    value = message.get("content")
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        message.refuse("content", "a string or a list of text parts")
    return "".join(_part(part, f"{message.place('content')}[{n}]") for n, part in enumerate(value))


def _part(item: object, place: str) -> str:
    part = _object(item, place)
    if part.get("type") != "text":
        raise BadRequest(
            f"'{place}' is not a text part, and this server reads only text.", param=place
        )
    text = part.text("text")
    return part.refuse("text", "a string") if text is None else text


def _object(item: object, place: str) -> Fields:
    if not isinstance(item, dict):
        raise BadRequest(f"'{place}' must be an object.", param=place)
    return Fields(item, place)


class ChatAnswer:
    """One answer's frame: its id, model and time are the same in every chunk."""

    def __init__(self, answer_id: str, model: str) -> None:
        self._frame = {"id": answer_id, "created": int(time.time()), "model": model}

    def whole(self, text: str, finish_reason: str, usage: Usage) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": finish_reason,
            "logprobs": None,
        }
        return {
            **self._frame,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage.wire(),
        }

    def role(self) -> dict[str, Any]:
        return self._chunk({"role": "assistant", "content": ""})

    def delta(self, text: str) -> dict[str, Any]:
        return self._chunk({"content": text})

    def finish(self, reason: str) -> dict[str, Any]:
        return self._chunk({}, reason)

    def usage(self, usage: Usage) -> dict[str, Any]:
        return {
            **self._frame,
            "object": "chat.completion.chunk",
            "choices": [],
            "usage": usage.wire(),
        }

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return {**self._frame, "object": "chat.completion.chunk", "choices": [choice]}


def error_body(error: RequestError) -> dict[str, Any]:
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }


def model_entry(model_id: str, more: dict[str, object]) -> dict[str, object]:
    """`created` is a field that clients expect and nobody can fill."""
    return {
        "id": model_id,
        "object": "model",
        "created": 0,
        "owned_by": "agent-memory",
        **more,
    }
