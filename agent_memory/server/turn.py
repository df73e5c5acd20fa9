"""A request of any API on its way through the engine, and what has come of it so far.

Knows how an answer is made of the engine's events, what is logged of it and explained.  Knows no
API's shapes.  Prompts and answers are not logged.  Event loop.
"""

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

import structlog
from starlette.requests import Request

from agent_memory.engine.engine import Engine
from agent_memory.engine.explain import Asked
from agent_memory.engine.served import Served
from agent_memory.errors import BadRequest, RequestError, Unavailable
from agent_memory.model import forms
from agent_memory.model.answers import AnswerReader, Part, Words
from agent_memory.model.grammar import Constraint
from agent_memory.model.tokenizer import ChatTokenizer
from agent_memory.request import (
    Conversation,
    Delta,
    Failed,
    Finished,
    FinishReason,
    GenerateRequest,
    Prompt,
    Scored,
    Started,
    TokenLogprob,
)
from agent_memory.server.ask import NO_EFFORT, Ask, Usage
from agent_memory.server.explain import Explained, Explanations
from agent_memory.server.gate import RETRY_AFTER_S
from agent_memory.server.merge import merged
from agent_memory.server.quotas import Quotas
from agent_memory.tenants import inside

TOOL_CALLS = "tool_calls"

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Begun:
    """The prompt's memory is in place.  Once, before everything else."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Of the answer `choice`, 0 if there is but one.  `logprobs`: if they were asked for."""

    choice: int
    parts: tuple[Part, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """`reason`: stop, length, or tool_calls.  `stop`: the stop string that ended it, if one did."""

    choice: int
    reason: str
    stop: str | None = None


Said = Begun | Scored | Piece | Ended


class Verbatim:
    """The reader of an answer that goes on from text or tokens: all of it is words."""

    num_calls = 0
    thinking = False

    def add(self, text: str) -> list[Part]:
        return [Words(text)] if text else []

    def end(self) -> list[Part]:
        return []


class Turn:
    """`kind` begins the answer's id.  `counts`: towards what its agent may ask, as one of the
    prompts of a request does.  Raises NotFound for a model that is not configured."""

    def __init__(self, request: Request, ask: Ask, kind: str, *, counts: bool = True) -> None:
        self._engine: Engine = request.state.engine
        self._explanations: Explanations = request.state.explanations
        self._quotas: Quotas = request.state.quotas if counts else Quotas()
        self._request_id: str = request.state.request_id
        self._tenant: str | None = request.state.caller.tenant
        self._agent = None if ask.agent is None else inside(self._tenant, ask.agent)
        self.ask = ask
        self.id = f"{kind}{uuid4().hex}"
        self.model = self._engine.models.find(ask.model).name
        self._served: Served | None = None
        self._leave: Callable[[], None] = lambda: None
        self._began = time.monotonic()
        self._told: Prompt = ask.prompt
        self._prompt: tuple[int, ...] = ()
        self._constraint: Constraint | None = None
        self._explained: Explained | None = None
        self._first_token: float | None = None
        self._num_tokens = [0] * ask.choices
        self._num_thought = 0  # tokens of thoughts, their markers counted with them
        self._finish: list[str] = [FinishReason.CANCELLED] * ask.choices

    @property
    def tokenizer(self) -> ChatTokenizer:
        return self.served.tokenizer

    @property
    def served(self) -> Served:
        """The model, from the moment it is there."""
        assert self._served is not None
        return self._served

    @property
    def prompt(self) -> tuple[int, ...]:
        return self._prompt

    def bytes_of(self, token: int) -> bytes:
        return self.served.bytes_of(token)

    def headers(self) -> dict[str, str]:
        """None yet, when a stream must start before its prompt's memory is in place."""
        return {"X-Cache": self._explained.header} if self._explained else {}

    def usage(self) -> Usage:
        assert self._explained is not None
        started = self._explained.started
        num_tokens = sum(self._num_tokens)
        return Usage(started.prompt_tokens, started.cached_tokens, num_tokens, self._num_thought)

    async def said(self) -> AsyncGenerator[Said, None]:
        """Up to a proper end of every answer.  Any other end is a RequestError."""
        try:
            self._leave = self._quotas.enter(self.ask.agent)
            async with self._engine.models.use(self.model) as self._served:
                requests = await self._admitted()
                answers = [self._answer(n, request) for n, request in enumerate(requests)]
                async with aclosing(merged(answers)) as pieces:
                    async for piece in pieces:
                        yield piece
        except RequestError as error:
            self._finish = [error.code] * self.ask.choices
            raise
        finally:
            self._leave()
            self._log()

    async def count(self) -> int:
        """The prompt's tokens, of a request that is not answered.  Raises RequestError."""
        async with self._engine.models.use(self.model) as self._served:
            heard = self._heard(self.ask.prompt)
            return len(await self._served.tokenize(heard, None, self._tenant))

    async def _admitted(self) -> list[GenerateRequest]:
        ask, served = self.ask, self.served
        self._told = self._heard(ask.prompt)
        self._prompt = await served.tokenize(self._told, self._agent, self._tenant)
        stable = await served.stable_tokens(self._told, self._prompt)
        if ask.logprobs is not None:
            await served.know_bytes()
        self._constraint = await self._constrained(ask)
        return [
            GenerateRequest(
                id=self.id if ask.choices == 1 else f"{self.id}-{choice}",
                agent=self._agent,
                prompt=self._prompt,
                sampling=ask.sampling_over(served.known.defaults, choice),
                max_tokens=ask.max_tokens,
                stop=ask.stop,
                priority=ask.priority,
                stable_tokens=stable,
                logprobs=ask.logprobs,
                prompt_logprobs=ask.prompt_logprobs and choice == 0,
                ignore_end=ask.ignore_end,
                tenant=self._tenant,
            )
            for choice in range(ask.choices)
        ]

    async def _constrained(self, ask: Ask) -> Constraint | None:
        tools = ask.calls.tools if ask.calls.must or ask.form else ()
        if not (tools or ask.form):
            return None
        form = None if ask.calls.must else ask.form
        after = self.tokenizer.end_of_thought(self._prompt)
        grammar = forms.grammar(form, tools, several=ask.calls.several, after_thought=bool(after))
        return await self.served.constraint(grammar, after, self._tenant)

    def _heard(self, prompt: Prompt) -> Prompt:
        """A conversation with what the template knows of how much to think.  Raises BadRequest."""
        if not isinstance(prompt, Conversation):
            return prompt
        known = self.tokenizer.template_words
        if self.ask.calls.tools and "tools" not in known:
            raise BadRequest(
                f"The chat template of '{self.model}' has no place for tools, so the model would "
                "not hear of them. Serve a model made for tools, or send none.",
                param="tools",
            )
        for name in prompt.options:
            if name not in known:
                raise BadRequest(
                    f"The chat template of '{self.model}' does not know '{name}'.",
                    param=f"chat_template_kwargs.{name}",
                )
        wishes: dict[str, Any] = {}
        if self.ask.effort is not None:
            wishes["reasoning_effort"] = self.ask.effort
            wishes["enable_thinking"] = self.ask.effort not in NO_EFFORT
        heard = {name: value for name, value in wishes.items() if name in known}
        return replace(prompt, options={**heard, **prompt.options})

    async def _answer(self, choice: int, request: GenerateRequest) -> AsyncGenerator[Said, None]:
        reader = self._reader()
        constraint = self._constraint and self._constraint.copy()
        async with aclosing(self.served.generate(request, constraint)) as events:
            async for event in events:
                match event:
                    case Started() if self._explained is None:
                        self._note(event)
                        yield Begun()
                    case Scored():
                        yield event
                    case Delta(text, num_tokens, logprobs):
                        self._first_token = self._first_token or time.monotonic()
                        thinking, parts = reader.thinking, reader.add(text)
                        if thinking or reader.thinking:
                            self._num_thought += num_tokens - self._num_tokens[choice]
                        self._num_tokens[choice] = num_tokens
                        if parts or logprobs:
                            yield Piece(choice, tuple(parts), logprobs)
                    case Finished():
                        if parts := reader.end():
                            yield Piece(choice, tuple(parts))
                        yield self._ended(choice, event, called=reader.num_calls > 0)
                    case Failed(error):
                        raise error

    def _reader(self) -> AnswerReader | Verbatim:
        if not isinstance(self._told, Conversation):
            return Verbatim()
        tools = self._told.tools if self.ask.calls.tools else ()
        held = self._constraint is not None
        return self.tokenizer.reader(self._prompt, tools=tools, forced=held)

    def _note(self, event: Started) -> None:
        told = self._told if isinstance(self._told, Conversation) else Conversation(())
        asked = Asked(self.ask.agent, self._prompt, told)
        self._explained = self._explanations.add(
            self._request_id, self.model, asked, event, self.tokenizer
        )

    def _ended(self, choice: int, event: Finished, *, called: bool) -> Ended:
        self._finish[choice], self._num_tokens[choice] = event.reason, event.completion_tokens
        if event.reason not in (FinishReason.STOP, FinishReason.LENGTH):
            raise _cut_short()
        if called and event.reason is FinishReason.STOP:
            self._finish[choice] = TOOL_CALLS
        return Ended(choice, self._finish[choice], event.stop)

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
            completion_tokens=sum(self._num_tokens),
            ttft_ms=self._ms_until(self._first_token),
            total_ms=self._ms_until(time.monotonic()),
            finish=",".join(map(str, self._finish)),
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
