"""POST /v1/chat/completions: from a body to an answer, whole or streamed.

Knows which events make which answer and what is logged of a request.  Prompts and answers are not.
Event loop.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from uuid import uuid4

import structlog
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from agent_memory.engine.engine import Engine
from agent_memory.engine.explain import Asked
from agent_memory.errors import RequestError, Unavailable
from agent_memory.request import (
    Delta,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerateRequest,
    Priority,
    Started,
)
from agent_memory.server import body, openai, sse
from agent_memory.server.explain import Explained, Explanations
from agent_memory.server.gate import RETRY_AFTER_S
from agent_memory.server.health import unknown_model
from agent_memory.server.identity import agent_of, priority_of
from agent_memory.server.openai import ChatAnswer, ChatRequest, Usage
from agent_memory.server.sse import EventStream, WhileConnected

LOADING_S = 120.0

log = structlog.get_logger(__name__)


async def chat_completions(request: Request) -> Response:
    engine: Engine = request.state.engine
    fields = body.parse(await request.body())
    chat = openai.parse_chat(fields)
    agent = agent_of(request.headers, fields)
    priority = priority_of(request.headers, fields)
    if chat.model not in (None, engine.model_id):
        raise unknown_model(str(chat.model), engine.model_id)
    explanations = request.state.explanations
    turn = Turn(engine, chat, agent, priority, request.state.request_id, explanations)
    return WhileConnected(turn.streamed() if chat.stream else turn.whole)


class Turn:
    """One request on its way through the engine, and what has come of it so far."""

    def __init__(
        self,
        engine: Engine,
        chat: ChatRequest,
        agent: str | None,
        priority: Priority,
        request_id: str,
        explanations: Explanations,
    ) -> None:
        self._engine = engine
        self._chat = chat
        self._agent = agent
        self._priority = priority
        self._request_id = request_id
        self._explanations = explanations
        self._id = f"chatcmpl-{uuid4().hex}"
        self._answer = ChatAnswer(self._id, engine.model_id)
        self._began = time.monotonic()
        self._prompt: tuple[int, ...] = ()
        self._explained: Explained | None = None
        self._first_token: float | None = None
        self._num_tokens = 0
        self._finish: str = FinishReason.CANCELLED

    async def whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events()) as events:
            texts = [event.text async for event in events if isinstance(event, Delta)]
        answer = self._answer.whole("".join(texts), self._finish, self._usage())
        await JSONResponse(answer, headers=self._headers())(scope, receive, send)

    def streamed(self) -> EventStream:
        return EventStream(self._chunks(), openai.error_body, self._headers)

    def _headers(self) -> dict[str, str]:
        """None yet, when a stream must start before its prompt's memory is in place."""
        return {"X-Cache": self._explained.header} if self._explained else {}

    async def _chunks(self) -> AsyncGenerator[bytes, None]:
        async with aclosing(self._events()) as events:
            async for event in events:
                match event:
                    case Started():
                        yield sse.event(self._answer.role())
                    case Delta(text) if text:
                        yield sse.event(self._answer.delta(text))
        yield sse.event(self._answer.finish(self._finish))
        if self._chat.include_usage:
            yield sse.event(self._answer.usage(self._usage()))
        yield sse.DONE

    async def _events(self) -> AsyncGenerator[Event, None]:
        """Events up to a proper end.  Any other end is a RequestError."""
        try:
            async with aclosing(self._engine.generate(await self._admitted())) as events:
                async for event in events:
                    self._note(event)
                    yield event
        except RequestError as error:
            self._finish = error.code
            raise
        finally:
            self._log()

    async def _admitted(self) -> GenerateRequest:
        model = await self._engine.wait_ready(LOADING_S)
        self._prompt = tuple(await self._engine.tokenize(self._chat.messages, self._agent))
        return GenerateRequest(
            id=self._id,
            agent=self._agent,
            prompt=self._prompt,
            sampling=self._chat.sampling_over(model.defaults),
            max_tokens=self._chat.max_tokens,
            stop=self._chat.stop,
            priority=self._priority,
            stable_tokens=await self._engine.stable_tokens(self._chat.messages, self._prompt),
        )

    def _note(self, event: Event) -> None:
        match event:
            case Started():
                asked = Asked(self._agent, self._prompt, self._chat.messages)
                self._explained = self._explanations.add(
                    self._request_id, self._engine.model_id, asked, event, self._engine.tokenizer
                )
            case Delta():
                self._first_token = self._first_token or time.monotonic()
                self._num_tokens = event.num_tokens
            case Finished(reason):
                self._finish, self._num_tokens = reason, event.completion_tokens
                if reason not in (FinishReason.STOP, FinishReason.LENGTH):
                    raise _cut_short()
            case Failed(error):
                raise error

    def _usage(self) -> Usage:
        assert self._explained is not None
        started = self._explained.started
        return Usage(started.prompt_tokens, started.cached_tokens, self._num_tokens)

    def _log(self) -> None:
        explained = self._explained
        started = explained.started if explained else None
        log.info(
            "request_done",
            request_id=self._request_id,
            agent=self._agent,
            prompt_tokens=started.prompt_tokens if started else 0,
            cached_memory=started.from_memory if started else 0,
            cached_disk=started.from_disk if started else 0,
            cause=str(explained.cause) if explained else None,
            matched=started.compared.position if started else 0,
            restore_ms=round(1000 * started.restore_s, 1) if started else None,
            completion_tokens=self._num_tokens,
            ttft_ms=self._ms_until(self._first_token),
            total_ms=self._ms_until(time.monotonic()),
            finish=str(self._finish),
        )

    def _ms_until(self, moment: float | None) -> int | None:
        return None if moment is None else round(1000 * (moment - self._began))


def _cut_short() -> Unavailable:
    return Unavailable(
        "The server is shutting down and ended this answer. What was computed is remembered: "
        "send the request again in a moment.",
        reason="draining",
        retry_after=RETRY_AFTER_S,
    )
