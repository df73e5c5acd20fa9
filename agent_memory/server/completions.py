"""POST /v1/completions: prompts as text or tokens, gone on from, whole or streamed.

The answers to all prompts are numbered on: those to the second begin at `n`.  docs/http-api.md
lists every field.  Event loop.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from agent_memory.errors import BadRequest
from agent_memory.model.answers import Words
from agent_memory.request import FinishReason, Prompt, Scored, TokenLogprob
from agent_memory.server import ask, body, openai, sse
from agent_memory.server.ask import Ask, Usage
from agent_memory.server.body import Fields
from agent_memory.server.chat import frame
from agent_memory.server.columns import Columns, Table
from agent_memory.server.merge import merged
from agent_memory.server.openai import error_body, refuse_not_built
from agent_memory.server.sse import EventStream, WhileConnected
from agent_memory.server.turn import Begun, Ended, Piece, Said, Turn

MAX_PROMPTS = 128
MAX_LOGPROBS = 5
MAX_TOKENS = 16
"""Of an answer, where the request does not say."""
AT_ONCE = 8
"""Prompts of one request; it is not to fill the queue alone."""

# Fields that would change the answer, with the values that leave it as it is.
NOT_BUILT: dict[str, tuple[object, ...]] = {"suffix": ("",)}


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """`asks`: one for each prompt.  `mute`: nothing but the prompt is wanted; the engine always
    generates something, which is thrown away."""

    asks: tuple[Ask, ...]
    echo: bool
    mute: bool
    stream: bool
    include_usage: bool


async def completions(request: Request) -> Response:
    asked = parse(body.parse(await request.body()), request.headers)
    turns = [Turn(request, one, "cmpl-", counts=n == 0) for n, one in enumerate(asked.asks)]
    if not asked.stream:
        return WhileConnected(Whole(turns, asked))
    return WhileConnected(EventStream(_chunks(turns, asked), error_body, turns[0].headers))


def parse(values: dict[str, Any], headers: Mapping[str, str]) -> CompletionRequest:
    """Raises BadRequest naming the field."""
    fields = Fields(values)
    refuse_not_built(fields, NOT_BUILT)
    agent, priority = ask.whose(headers, values)
    echo, max_tokens = fields.flag("echo"), _max_tokens(fields)
    logprobs = fields.integer("logprobs", 0, MAX_LOGPROBS)
    one = Ask(
        model=fields.text("model"),
        agent=agent,
        priority=priority,
        prompt="",
        max_tokens=max(1, max_tokens),
        stop=ask.stops(fields),
        sampling=ask.sampling(fields),
        choices=_choices(fields),
        logprobs=logprobs,
        prompt_logprobs=echo and logprobs is not None,
        # The end of turn has no logprob.  Who asks for one token is told of one, whichever it is.
        ignore_end=fields.flag("ignore_eos") or max_tokens <= 1,
        form=ask.form(fields.below("response_format"), "json_schema"),
    )
    return CompletionRequest(
        tuple(replace(one, prompt=prompt) for prompt in _prompts(fields)),
        echo=echo,
        mute=not max_tokens,
        stream=fields.flag("stream"),
        include_usage=fields.below("stream_options").flag("include_usage"),
    )


def _max_tokens(fields: Fields) -> int:
    asked = fields.integer("max_tokens", 0)
    if asked == 0 and not fields.flag("echo"):
        fields.refuse("max_tokens", "at least 1, or 0 with 'echo': true")
    return MAX_TOKENS if asked is None else asked


def _choices(fields: Fields) -> int:
    choices = fields.integer("n", 1, ask.MAX_CHOICES) or 1
    if fields.integer("best_of", 1, ask.MAX_CHOICES) not in (None, choices):
        fields.refuse("best_of", "absent or the same as 'n'")
    return choices


def _prompts(fields: Fields) -> list[Prompt]:
    value = fields.get("prompt")
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not 0 < len(value):
        fields.refuse("prompt", "a string, a list of token ids, or a list of such")
    if _are_tokens(value):
        return [tuple(value)]
    if len(value) > MAX_PROMPTS:
        fields.refuse("prompt", f"at most {MAX_PROMPTS} prompts")
    return [_prompt(fields, n, one) for n, one in enumerate(value)]


def _prompt(fields: Fields, number: int, value: object) -> Prompt:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and _are_tokens(value):
        return tuple(value)
    return fields.refuse(f"prompt[{number}]", "a string or a list of token ids")


def _are_tokens(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


# ── answers ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Bit:
    """More of the answer `index`.  `table` None: no logprobs were asked for."""

    index: int
    text: str
    table: Table | None
    reason: str | None = None

    def wire(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "text": self.text,
            "logprobs": self.table,
            "finish_reason": self.reason,
        }


async def _bits(turns: list[Turn], asked: CompletionRequest) -> AsyncGenerator[Bit, None]:
    """Of all answers, in any order; those of one are in order."""
    room = asyncio.Semaphore(AT_ONCE)
    several = len(turns) > 1
    streams = [
        _of_prompt(turn, n, asked, room, f"prompt[{n}]" if several else "prompt")
        for n, turn in enumerate(turns)
    ]
    async with aclosing(merged(streams)) as bits:
        async for bit in bits:
            yield bit


async def _of_prompt(
    turn: Turn, number: int, asked: CompletionRequest, room: asyncio.Semaphore, place: str
) -> AsyncGenerator[Bit, None]:
    choices = turn.ask.choices
    answers = [Answer(number * choices + n, turn, asked) for n in range(choices)]
    try:
        async with room, aclosing(_in_order(turn)) as said:
            async for item in said:
                match item:
                    case list() if asked.echo:
                        if not isinstance(turn.ask.prompt, str):
                            await turn.served.know_bytes()
                        for answer in answers:
                            yield answer.echo(item)
                    case Piece(choice) if not asked.mute:
                        yield answers[choice].more(item)
                    case Ended(choice, reason):
                        yield answers[choice].end(reason)
    except BadRequest as error:  # what every prompt is refused for is said of messages
        error.param = place if error.param == "messages" else error.param
        raise


async def _in_order(turn: Turn) -> AsyncGenerator[list[TokenLogprob] | Piece | Ended, None]:
    """First the prompt's logprobs, all of them, then the answers: with several, one may begin
    before the prompt's are there."""
    scored: list[TokenLogprob] = []
    early: list[Said] = []
    async with aclosing(turn.said()) as said:
        async for item in said:
            if isinstance(item, Scored):
                scored += item.logprobs
            else:
                early.append(item)
            if len(scored) == (len(turn.prompt) - 1 if turn.ask.prompt_logprobs else 0):
                for one in early:
                    if isinstance(one, Begun):
                        yield scored
                    elif not isinstance(one, Scored):
                        yield one
                early.clear()
    assert not early


class Answer:
    """One answer on its way out, with the place in its text that it has come to."""

    def __init__(self, index: int, turn: Turn, asked: CompletionRequest) -> None:
        self._index = index
        self._turn = turn
        self._asked = asked

    @cached_property
    def _columns(self) -> Columns | None:
        """If they are wanted; first asked for when the model is there."""
        turn = self._turn
        if turn.ask.logprobs is None:
            return None
        return Columns(turn.bytes_of, turn.tokenizer.silent)

    def echo(self, scored: list[TokenLogprob]) -> Bit:
        turn, columns = self._turn, self._columns
        text = turn.ask.prompt
        if not isinstance(text, str):
            text = b"".join(map(turn.bytes_of, turn.prompt)).decode(errors="replace")
        table = columns.prompt(text, turn.prompt[0], scored) if columns else None
        return Bit(self._index, text, table)

    def more(self, piece: Piece) -> Bit:
        text = "".join(part.text for part in piece.parts if isinstance(part, Words))
        return Bit(self._index, text, self._columns.more(piece.logprobs) if self._columns else None)

    def end(self, reason: str) -> Bit:
        reason = FinishReason.LENGTH if self._asked.mute else reason
        return Bit(self._index, "", self._columns.more(()) if self._columns else None, reason)


class Whole:
    def __init__(self, turns: list[Turn], asked: CompletionRequest) -> None:
        self._turns = turns
        self._asked = asked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gathered: dict[int, Bit] = {}
        async with aclosing(_bits(self._turns, self._asked)) as bits:
            async for bit in bits:
                before = gathered.get(bit.index)
                gathered[bit.index] = _joined(before, bit) if before else bit
        answer = {
            **frame(self._turns[0], "text_completion"),
            "choices": [bit.wire() for _, bit in sorted(gathered.items())],
            "usage": openai.usage(_usage(self._turns, self._asked)),
        }
        await JSONResponse(answer, headers=self._turns[0].headers())(scope, receive, send)


def _joined(before: Bit, bit: Bit) -> Bit:
    if before.table is not None and bit.table is not None:
        for name, column in bit.table.items():
            before.table[name] += column
    return replace(before, text=before.text + bit.text, reason=bit.reason)


def _usage(turns: list[Turn], asked: CompletionRequest) -> Usage:
    every = [turn.usage() for turn in turns]
    return Usage(
        sum(used.prompt_tokens for used in every),
        sum(used.cached_tokens for used in every),
        0 if asked.mute else sum(used.completion_tokens for used in every),
    )


async def _chunks(turns: list[Turn], asked: CompletionRequest) -> AsyncGenerator[bytes, None]:
    head = frame(turns[0], "text_completion")
    usage = {"usage": None} if asked.include_usage else {}
    async with aclosing(_bits(turns, asked)) as bits:
        async for bit in bits:
            yield sse.event({**head, "choices": [bit.wire()], **usage})
    if asked.include_usage:
        yield sse.event({**head, "choices": [], "usage": openai.usage(_usage(turns, asked))})
    yield sse.DONE
