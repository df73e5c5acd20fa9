"""POST /v1/messages and its count_tokens: from a body to an answer, whole or streamed, as Anthropic
has them.

docs/http-api.md lists every field.  Event loop.
"""

import json
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from agent_memory.model.answers import CallArguments, CallBegins, Part, Thought, Words
from agent_memory.model.forms import Form
from agent_memory.request import Conversation
from agent_memory.server import anthropic, ask, body
from agent_memory.server.anthropic import error_body
from agent_memory.server.anthropic_prompt import goes_on, messages, tools_and_calls
from agent_memory.server.ask import Ask
from agent_memory.server.body import Fields
from agent_memory.server.openai import refuse_not_built
from agent_memory.server.sse import EventStream, WhileConnected, named_event
from agent_memory.server.turn import Begun, Ended, Piece, Turn

# Fields that would change the answer, with the values that leave it as it is.
NOT_BUILT: dict[str, tuple[object, ...]] = {
    "compaction": (),
    "container": (),
    "mcp_servers": ([],),
    "thread": (),
}
EFFORTS = ("low", "medium", "high", "xhigh", "max")
THINKING = ("enabled", "disabled", "adaptive", "between_tools")
BUDGETS = ((4_096, "low"), (16_384, "medium"))
"""A template knows efforts only: of a budget in tokens up to so many this one, beyond all high."""
SIGNATURE = "agent-memory"
"""Clients want one to every thought.  It proves nothing and is not looked at."""
PING = named_event({"type": "ping"})
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


@dataclass(frozen=True, slots=True)
class MessagesRequest:
    """`marked`: something in it is, to be cached."""

    ask: Ask
    stream: bool
    marked: bool


async def create(request: Request) -> Response:
    asked = parse(body.parse(await request.body()), request.headers)
    turn = Turn(request, asked.ask, "msg_")
    if not asked.stream:
        return WhileConnected(Whole(turn, marked=asked.marked))
    failure = partial(error_body, request_id=request.state.request_id)
    events = _events(turn, marked=asked.marked)
    return WhileConnected(
        EventStream(events, failure, turn.headers, shaped=named_event, end=b"", keep_alive=PING)
    )


async def count_tokens(request: Request) -> Response:
    asked = parse(body.parse(await request.body()), request.headers, counted=True)
    num_tokens = await Turn(request, asked.ask, "count_").count()
    return JSONResponse({"input_tokens": num_tokens})


def parse(
    values: dict[str, Any], headers: Mapping[str, str], *, counted: bool = False
) -> MessagesRequest:
    """`counted`: there will be no answer.  Raises BadRequest naming the field."""
    fields = Fields(values)
    refuse_not_built(fields, NOT_BUILT)
    agent, priority = ask.whose(headers, values)
    tools, calls = tools_and_calls(fields)
    told, form = messages(fields), form_of(fields)
    begun = goes_on(fields, told)
    if begun and (form or calls.must):
        fields.refuse("messages", "ended by a user's where the answer's form is given")
    max_tokens = fields.integer("max_tokens", 1)
    if max_tokens is None and not counted:
        fields.refuse("max_tokens", "an integer of at least 1")
    return MessagesRequest(
        Ask(
            model=fields.text("model"),
            agent=agent,
            priority=priority,
            prompt=Conversation(told, tools, ask.options(fields), goes_on=begun),
            effort=effort_of(fields),
            max_tokens=max_tokens,
            stop=ask.stops(fields, "stop_sequences"),
            sampling=ask.sampling(fields, most_temperature=1),
            form=form,
            calls=calls,
        ),
        stream=fields.flag("stream"),
        marked=any(block.get("cache_control") is not None for block in _markable(values)),
    )


def effort_of(fields: Fields) -> str | None:
    """How much to think; None: as the template has it."""
    thinking = fields.below("thinking")
    kind, budget = thinking.choice("type", THINKING), thinking.integer("budget_tokens", 1)
    effort = fields.below("output_config").choice("effort", EFFORTS)
    if kind is None and thinking:
        thinking.refuse("type", "one of " + ", ".join(THINKING))
    if kind == "disabled":
        return "none"
    if effort is not None or kind in (None, "between_tools"):
        return effort
    fitting = (word for most, word in BUDGETS if budget is not None and budget <= most)
    return next(fitting, "high")


def form_of(fields: Fields) -> Form | None:
    """What no grammar can hold is an error: the form is a promise."""
    place = fields.below("output_config")
    told = (
        place.below("format") if place.get("format") is not None else fields.below("output_format")
    )
    if not told:
        return None
    if told.get("type") != "json_schema":
        told.refuse("type", "'json_schema'")
    schema = told.get("schema")
    if not isinstance(schema, dict):
        told.refuse("schema", "a JSON schema, which is an object")
    return Form(schema, strict=True)


def _markable(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every object of a request in which `cache_control` has its meaning."""
    yield values
    for name in ("system", "tools", "messages", "content"):
        items = values.get(name)
        for item in items if isinstance(items, list) else ():
            if isinstance(item, dict):
                yield from _markable(item)


# ── answers ──────────────────────────────────────────────────────────────────────────────────


class Content:
    """An answer's blocks, and the events that tell of them as they come.

    One block is open at a time; parts of its kind go on with it, any other closes it.
    """

    def __init__(self) -> None:
        self.blocks: list[dict[str, Any]] = []
        self._kind: type[Part] | None = None
        self._pieces: list[str] = []

    def add(self, part: Part) -> list[dict[str, Any]]:
        match part:
            case Words(text):
                events = self._open(Words, {"type": "text", "text": ""})
                delta = {"type": "text_delta", "text": text}
            case Thought(text):
                empty = {"type": "thinking", "thinking": "", "signature": ""}
                events = self._open(Thought, empty)
                delta = {"type": "thinking_delta", "thinking": text}
            case CallBegins(_, call_id, name):
                call = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
                return self.end() + self._open(CallBegins, call)
            case CallArguments(_, text):
                events, delta = [], {"type": "input_json_delta", "partial_json": text}
        self._pieces.append(text)
        return [*events, self._delta(delta)]

    def end(self) -> list[dict[str, Any]]:
        """Closes what is open."""
        if self._kind is None:
            return []
        block, text = self.blocks[-1], "".join(self._pieces)
        events = []
        match block["type"]:
            case "text":
                block["text"] = text
            case "thinking":
                block["thinking"], block["signature"] = text, SIGNATURE
                events.append(self._delta({"type": "signature_delta", "signature": SIGNATURE}))
            case "tool_use":
                block["input"] = _input(text)
        self._kind, self._pieces = None, []
        return [*events, {"type": "content_block_stop", "index": len(self.blocks) - 1}]

    def _open(self, kind: type[Part], block: dict[str, Any]) -> list[dict[str, Any]]:
        if self._kind is kind:
            return []
        events = self.end()
        self._kind = kind
        self.blocks.append(block)
        start = {"type": "content_block_start", "index": len(self.blocks) - 1}
        return [*events, {**start, "content_block": dict(block)}]

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self.blocks) - 1, "delta": delta}


def _input(text: str) -> dict[str, Any]:
    """Of a call that was cut short nothing can be used."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


async def _events(turn: Turn, *, marked: bool) -> AsyncGenerator[bytes, None]:
    content, ended = Content(), {"stop_reason": None, "stop_sequence": None}
    async with aclosing(turn.said()) as said:
        async for item in said:
            match item:
                case Begun():
                    message = {**frame(turn, marked=marked), "content": [], **ended}
                    yield named_event({"type": "message_start", "message": message})
                case Piece(_, parts, _):
                    for part in parts:
                        for event in content.add(part):
                            yield named_event(event)
                case Ended():
                    for event in content.end():
                        yield named_event(event)
                    usage = anthropic.usage(turn.usage(), marked=marked)
                    delta = {"type": "message_delta", "delta": end_of(item), "usage": usage}
                    yield named_event(delta)
    yield named_event({"type": "message_stop"})


class Whole:
    def __init__(self, turn: Turn, *, marked: bool) -> None:
        self._turn = turn
        self._marked = marked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        turn, content, ended = self._turn, Content(), dict[str, str | None]()
        async with aclosing(turn.said()) as said:
            async for item in said:
                match item:
                    case Piece(_, parts, _):
                        for part in parts:
                            content.add(part)
                    case Ended():
                        content.end()
                        ended = end_of(item)
        answer = {**frame(turn, marked=self._marked), "content": content.blocks, **ended}
        await JSONResponse(answer, headers=turn.headers())(scope, receive, send)


def end_of(ended: Ended) -> dict[str, str | None]:
    reason = "stop_sequence" if ended.stop is not None else STOP_REASONS[ended.reason]
    return {"stop_reason": reason, "stop_sequence": ended.stop}


def frame(turn: Turn, *, marked: bool) -> dict[str, Any]:
    """What an answer says of itself at any time."""
    return {
        "id": turn.id,
        "type": "message",
        "role": "assistant",
        "model": turn.model,
        "usage": anthropic.usage(turn.usage(), marked=marked),
    }
