"""POST /v1/chat/completions: from a body to an answer, whole or streamed, as OpenAI has them.

docs/http-api.md lists every field.  Event loop.
"""

import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from agent_memory.model.answers import CallArguments, CallBegins, Part, Thought, Words
from agent_memory.request import Conversation, TokenLogprob
from agent_memory.server import ask, body, openai, sse
from agent_memory.server.ask import Ask
from agent_memory.server.body import Fields
from agent_memory.server.messages import messages
from agent_memory.server.openai import error_body, refuse_not_built
from agent_memory.server.sse import EventStream, WhileConnected
from agent_memory.server.tools import tools_and_calls
from agent_memory.server.turn import Begun, Ended, Piece, Turn

# Fields that would change the answer, with the values that leave it as it is.
NOT_BUILT: dict[str, tuple[object, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "web_search_options": (),
}


@dataclass(frozen=True, slots=True)
class ChatRequest:
    ask: Ask
    stream: bool
    include_usage: bool


async def chat_completions(request: Request) -> Response:
    chat = parse(body.parse(await request.body()), request.headers)
    turn = Turn(request, chat.ask, "chatcmpl-")
    if not chat.stream:
        return WhileConnected(Whole(turn))
    return WhileConnected(EventStream(_chunks(turn, chat), error_body, turn.headers))


def parse(values: dict[str, Any], headers: Mapping[str, str]) -> ChatRequest:
    """Raises BadRequest naming the field."""
    fields = Fields(values)
    refuse_not_built(fields, NOT_BUILT)
    agent, priority = ask.whose(headers, values)
    tools, calls = tools_and_calls(fields)
    short, long = (fields.integer(name, 1) for name in ("max_tokens", "max_completion_tokens"))
    return ChatRequest(
        Ask(
            model=fields.text("model"),
            agent=agent,
            priority=priority,
            prompt=Conversation(messages(fields), tools, ask.options(fields)),
            effort=fields.choice("reasoning_effort", ask.EFFORTS),
            max_tokens=short if long is None else long,
            stop=ask.stops(fields),
            sampling=ask.sampling(fields),
            choices=fields.integer("n", 1, ask.MAX_CHOICES) or 1,
            logprobs=_logprobs(fields),
            ignore_end=fields.flag("ignore_eos"),
            form=ask.form(fields.below("response_format"), "json_schema"),
            calls=calls,
        ),
        stream=fields.flag("stream"),
        include_usage=fields.below("stream_options").flag("include_usage"),
    )


def _logprobs(fields: Fields) -> int | None:
    wanted, top = fields.flag("logprobs"), fields.integer("top_logprobs", 0, ask.MAX_LOGPROBS)
    if top and not wanted:
        fields.refuse("top_logprobs", "0 or absent without 'logprobs': true")
    return top or 0 if wanted else None


# ── answers ──────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class Message:
    """One answer, gathered."""

    words: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    reason: str = ""

    def add(self, part: Part) -> None:
        match part:
            case Words(text):
                self.words.append(text)
            case Thought(text):
                self.thoughts.append(text)
            case CallBegins(_, call_id, name):
                function = {"name": name, "arguments": ""}
                self.calls.append({"id": call_id, "type": "function", "function": function})
            case CallArguments(number, text):
                self.calls[number]["function"]["arguments"] += text

    def wire(self) -> dict[str, Any]:
        content = "".join(self.words)
        told: dict[str, Any] = {
            "role": "assistant",
            "content": None if self.calls and not content else content,
            "refusal": None,
        }
        if self.thoughts:
            told["reasoning_content"] = "".join(self.thoughts)
        if self.calls:
            told["tool_calls"] = self.calls
        return told


class Whole:
    def __init__(self, turn: Turn) -> None:
        self._turn = turn

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        turn = self._turn
        gathered = [Message() for _ in range(turn.ask.choices)]
        async with aclosing(turn.said()) as said:
            async for item in said:
                match item:
                    case Piece(choice, parts, logprobs):
                        for part in parts:
                            gathered[choice].add(part)
                        gathered[choice].logprobs += shown(logprobs, turn.bytes_of)
                    case Ended(choice, reason, _):
                        gathered[choice].reason = reason
        answer = {
            **frame(turn, "chat.completion"),
            "choices": [self._choice(n, message) for n, message in enumerate(gathered)],
            "usage": openai.usage(turn.usage()),
        }
        await JSONResponse(answer, headers=turn.headers())(scope, receive, send)

    def _choice(self, index: int, message: Message) -> dict[str, Any]:
        wanted = self._turn.ask.logprobs is not None
        return {
            "index": index,
            "message": message.wire(),
            "finish_reason": message.reason,
            "logprobs": {"content": message.logprobs, "refusal": None} if wanted else None,
        }


async def _chunks(turn: Turn, chat: ChatRequest) -> AsyncGenerator[bytes, None]:
    head = frame(turn, "chat.completion.chunk")

    def chunk(
        choice: int,
        delta: dict[str, Any],
        reason: str | None = None,
        logprobs: Sequence[TokenLogprob] = (),
    ) -> bytes:
        told = {"content": shown(logprobs, turn.bytes_of), "refusal": None} if logprobs else None
        one = {"index": choice, "delta": delta, "finish_reason": reason, "logprobs": told}
        usage = {"usage": None} if chat.include_usage else {}
        return sse.event({**head, "choices": [one], **usage})

    async with aclosing(turn.said()) as said:
        async for item in said:
            match item:
                case Begun():
                    for choice in range(chat.ask.choices):
                        yield chunk(choice, {"role": "assistant", "content": ""})
                case Piece(choice, parts, logprobs):
                    for n, part in enumerate(parts or [Words("")]):
                        yield chunk(choice, _delta(part), logprobs=() if n else logprobs)
                case Ended(choice, reason, _):
                    yield chunk(choice, {}, reason)
    if chat.include_usage:
        yield sse.event({**head, "choices": [], "usage": openai.usage(turn.usage())})
    yield sse.DONE


def _delta(part: Part) -> dict[str, Any]:
    match part:
        case Words(text):
            return {"content": text}
        case Thought(text):
            return {"reasoning_content": text}
        case CallBegins(number, call_id, name):
            function = {"name": name, "arguments": ""}
            call = {"index": number, "id": call_id, "type": "function", "function": function}
            return {"tool_calls": [call]}
        case CallArguments(number, text):
            return {"tool_calls": [{"index": number, "function": {"arguments": text}}]}


def frame(turn: Turn, kind: str) -> dict[str, Any]:
    """The same in every chunk of an answer."""
    return {"id": turn.id, "object": kind, "created": int(time.time()), "model": turn.model}


def shown(
    logprobs: Sequence[TokenLogprob], bytes_of: Callable[[int], bytes]
) -> list[dict[str, Any]]:
    def one(token: int, logprob: float) -> dict[str, Any]:
        raw = bytes_of(token)
        return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}

    return [
        {**one(at.token, at.logprob), "top_logprobs": [one(*other) for other in at.top]}
        for at in logprobs
    ]
