"""One configured model as requests see it: what is known of it, and their road into the engine.

    UNLOADED ─► LOADING ─► READY ─► UNLOADED
                   └─────► FAILED ─► LOADING      only when somebody asks for it by name

Holds nothing of MLX: the model itself is on the engine thread, under its name.  Who comes to it and
when it goes, models.py decides.  Event loop, but for `tell`.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from enum import StrEnum
from functools import partial

import structlog

from agent_memory.engine import limits
from agent_memory.engine.limits import ModelInfo, Queue
from agent_memory.engine.mailbox import Mailbox
from agent_memory.engine.phase import LoadCancelled, Phase, refusal
from agent_memory.engine.residents import Residents
from agent_memory.errors import Unavailable
from agent_memory.failpoint import failpoint
from agent_memory.model.grammar import Constraint, Grammars
from agent_memory.model.loader import Prepared, Progress
from agent_memory.model.tokenizer import ChatTokenizer
from agent_memory.model_source import ModelSource
from agent_memory.request import Conversation, Event, Failed, Finished, GenerateRequest, Prompt

log = structlog.get_logger(__name__)


class Loaded(StrEnum):
    UNLOADED = "unloaded"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


TRANSITIONS = {
    Loaded.UNLOADED: {Loaded.LOADING},
    Loaded.LOADING: {Loaded.READY, Loaded.FAILED, Loaded.UNLOADED},
    Loaded.READY: {Loaded.UNLOADED},
    Loaded.FAILED: {Loaded.LOADING, Loaded.UNLOADED},
}


class Served:
    """`users`: requests that have it or wait for it to load.  `leaving`: it must make room; who
    comes now waits until that is done.  `info` stays when it is unloaded, `warnings` too."""

    def __init__(
        self,
        source: ModelSource,
        residents: Residents,
        mailbox: Mailbox,
        queue: Queue,
        note: Callable[[str], object],
    ) -> None:
        """`note`: told of each step of a load; any thread."""
        self.source = source
        self.phase = Loaded.UNLOADED
        self.progress: dict[str, object] = {}
        self.failure: str | None = None
        self.info: ModelInfo | None = None
        self.warnings: list[str] = []
        self.users = 0
        self.last_used = 0.0  # monotonic
        self.leaving = False
        self.ending = False  # the server is
        self.make_room: Callable[[Served, int], Awaitable[None]] | None = None
        self.most_alone: Callable[[Served], int] | None = None
        self._residents = residents
        self._mailbox = mailbox
        self._queue = queue
        self._note = note
        self._tokenizer: ChatTokenizer | None = None
        self._grammars: Grammars | None = None
        self._began = 0.0

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def known(self) -> ModelInfo:
        assert self.info is not None
        return self.info

    @property
    def tokenizer(self) -> ChatTokenizer:
        assert self._tokenizer is not None
        return self._tokenizer

    @property
    def most_tokens(self) -> int:
        """The longest sequence there is memory for, with those in memory that are."""
        return self.known.cost.most_tokens(self._residents.ledger.spare_bytes)

    # ── what becomes of it ───────────────────────────────────────────────────────────────────

    def move(self, phase: Loaded, failure: str | None = None) -> None:
        assert phase in TRANSITIONS[self.phase], f"{self.phase} -> {phase}"
        self.phase, self.failure = phase, failure
        self._note("")
        if phase is Loaded.LOADING:
            self._began, self.progress = time.monotonic(), {}
        elif phase is not Loaded.READY:
            self._tokenizer = self._grammars = None

    def take(self, prepared: Prepared, info: ModelInfo) -> None:
        """It is in memory."""
        self.info = info
        self._tokenizer = prepared.tokenizer
        self._grammars = Grammars(
            prepared.tokenizer.to_json, info.vocab_size, prepared.tokenizer.end_of_turn
        )

    @property
    def load_s(self) -> float:
        return round(time.monotonic() - self._began, 2)

    def tell(self, progress: Progress) -> None:
        """Any thread.  Raises LoadCancelled when nobody wants it any more."""
        if self.ending:
            raise LoadCancelled("The server is shutting down.")
        new = self.progress.get("step") != progress.step
        self.progress = {
            "step": progress.step,
            "done": progress.done,
            "of": progress.of,
            "bytes": progress.num_bytes,
            "elapsed_s": self.load_s,
        }
        if new:
            self._note(progress.step)
            self.log_progress()
            failpoint("engine.load")

    def log_progress(self) -> None:
        log.info("model_loading", model=self.name, **{**self.progress, "elapsed_s": self.load_s})

    # ── requests: only between the beginning and the end of a use ────────────────────────────

    async def tokenize(
        self, prompt: Prompt, agent: str | None, tenant: str | None = None
    ) -> tuple[int, ...]:
        """Made in a worker thread; meanwhile the agent's memory is read.  Raises RequestError."""
        self._queue.refuse_when_full(tenant)
        if agent is not None:
            self._mailbox.send(partial(self._residents.expect, self.name, agent))
        return tuple(await asyncio.to_thread(self.tokenizer.tokens_of, prompt))

    async def stable_tokens(self, prompt: Prompt, tokens: Sequence[int]) -> int:
        """As of the tokenizer, where a model needs to know; else 0."""
        if not (self.known.spec.states and isinstance(prompt, Conversation)):
            return 0
        return await asyncio.to_thread(self.tokenizer.stable_tokens, prompt, tokens)

    async def know_bytes(self) -> None:
        """Before `bytes_of` is asked: the first time it takes a second or two, in a worker thread.
        Raises RequestError."""
        assert self._grammars is not None
        await asyncio.to_thread(self._grammars.bytes_of, 0)

    def bytes_of(self, token: int) -> bytes:
        """Of its text."""
        assert self._grammars is not None
        return self._grammars.bytes_of(token)

    async def constraint(
        self, grammar: str, opening: tuple[int, ...] = (), tenant: str | None = None
    ) -> Constraint:
        """Compiled in a worker thread; `grammar` and `opening` as of model/grammar.py.  Raises
        RequestError."""
        assert self._grammars is not None
        self._refuse_at_the_end()
        self._queue.refuse_when_full(tenant)
        return await asyncio.to_thread(self._grammars.constraint, grammar, opening)

    async def generate(
        self, request: GenerateRequest, constraint: Constraint | None = None
    ) -> AsyncGenerator[Event, None]:
        """Events of a request; closing the iterator cancels it.  Raises RequestError at once if it
        cannot be served; what fails later comes as the event Failed.  The constraint, which the
        answer keeps to, is this request's alone from now on."""
        self._refuse_at_the_end()
        assert self.most_alone is not None and self.make_room is not None
        num_tokens = limits.check(request, self.known, self.most_alone(self))
        if num_tokens > self.most_tokens:
            await self.make_room(self, num_tokens)
        ended, began = False, time.monotonic()
        self._queue.enter(request.tenant)
        stream = self._mailbox.stream()
        try:
            submit = partial(self._residents.submit, self.name, request, stream, constraint)
            self._mailbox.send(submit)
            while not ended:
                event = await stream.get()
                ended = isinstance(event, Finished | Failed)
                yield event
        finally:
            self._queue.leave(request.tenant, time.monotonic() - began)
            if not ended:
                self._mailbox.send(partial(self._residents.cancel, self.name, request.id))

    def _refuse_at_the_end(self) -> None:
        if self.ending:
            raise draining()


def draining() -> Unavailable:
    return refusal(Phase.DRAINING, {}, None)
