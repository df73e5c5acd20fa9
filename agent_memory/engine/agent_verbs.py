"""What people do with an agent's memory: look, fork, rewind, pin, warm, remove.

Knows which of it needs the engine thread and which a model.  What is only memory is done here and
now; the store brings it to disk.  Event loop.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from agent_memory.engine.agent_views import AgentView, AgentViews, HeadView
from agent_memory.engine.mailbox import Mailbox
from agent_memory.engine.step_loop import StepLoop
from agent_memory.errors import Conflict, Unavailable
from agent_memory.kvcache.block_pool import BlockPool
from agent_memory.store.block_store import BlockStore

WARM_S = 60.0
FLUSH_S = 30.0

Steps = Callable[[], StepLoop | None]
"""The loaded model at work, None before and after."""


class AgentVerbs:
    """`on_removed`: told the name of every agent that was removed, when nothing of it is left."""

    def __init__(self, store: BlockStore, pool: BlockPool, mailbox: Mailbox, steps: Steps) -> None:
        self._store = store
        self._pool = pool
        self._mailbox = mailbox
        self._steps = steps
        self._views = AgentViews(store, pool)
        self.on_removed: list[Callable[[str], object]] = []

    def all(self) -> list[AgentView]:
        """The most recently used first."""
        return self._views.all()

    def one(self, agent_id: str) -> AgentView:
        """Raises NotFound, as every verb does."""
        return self._views.one(self._store.agents.known(agent_id))

    def fork(self, agent_id: str, new_id: str, head_id: str | None) -> AgentView:
        """A new agent with the same conversation; no payload is copied.  Raises Conflict."""
        return self._views.one(self._store.fork(agent_id, new_id, head_id))

    def rewind(
        self, agent_id: str, head_id: str | None, *, num_tokens: int | None, turn: int | None
    ) -> AgentView:
        """Forget what comes after so many tokens, or after the end of that turn, the first being 1.

        Raises Conflict where the conversation is not that long.
        """
        if turn is not None:
            head = self._store.agents.known(agent_id).head(head_id)
            if turn > len(head.turns):
                raise Conflict(
                    f"The conversation has {len(head.turns)} turns that are known as such, so it "
                    f"cannot be rewound to turn {turn}. Name an earlier one, or 'tokens'.",
                    param="turn",
                    code="beyond_the_end",
                )
            num_tokens = head.turns[turn - 1][1]
        assert num_tokens is not None
        return self._views.one(self._store.rewind(agent_id, num_tokens, head_id))

    def pin(self, agent_id: str, *, pinned: bool) -> AgentView:
        return self._views.one(self._store.set_pinned(agent_id, pinned))

    async def warm(self, agent_id: str) -> AgentView:
        """Bring its newest head to RAM, as far as there is room."""
        self._store.agents.known(agent_id)
        steps = self.working()
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # who gives up waiting must not end it for the engine
        self._mailbox.send(partial(steps.memory.warm, agent_id, partial(done.set_result, None)))
        try:
            async with asyncio.timeout(WARM_S):
                await asyncio.wrap_future(done)
        except TimeoutError as error:
            raise Unavailable(
                f"Not all was read within {WARM_S:.0f} s; it goes on. Ask again.",
                reason="busy",
                retry_after=5,
            ) from error
        return self.one(agent_id)

    async def remove(self, agent_id: str) -> None:
        """Nothing that was its alone is left, in RAM or on disk.  Raises Conflict while it is
        being answered."""
        await asyncio.wrap_future(self._mailbox.call(partial(self._remove, agent_id)))
        if not await asyncio.to_thread(self._store.flush, FLUSH_S):
            raise Unavailable(
                f"'{agent_id}' is forgotten, but its files are not deleted yet. They will be.",
                reason="busy",
                retry_after=5,
            )
        for told in self.on_removed:
            told(agent_id)

    def _remove(self, agent_id: str) -> None:
        """Engine thread: between two steps nobody commits."""
        self._store.agents.known(agent_id)
        steps = self._steps()
        if steps and any(seq.request.agent == agent_id for seq in steps.scheduler):
            raise Conflict(
                f"'{agent_id}' is being answered now and would be remembered again. Wait for the "
                "answer, or end the request, and ask again.",
                code="agent_in_use",
            )
        for block_hash in self._store.remove(agent_id):
            self._pool.drop(block_hash)
        if steps:
            steps.memory.witness.forget(agent_id)

    async def texts(self, head: HeadView) -> list[tuple[str, str]] | None:
        """What was asked and answered in each of its turns; None if another model's."""
        steps = self.working()
        if head.fingerprint != steps.memory.spec.fingerprint:
            return None
        return await asyncio.to_thread(_texts, head, steps.loaded.tokenizer.decode)

    def working(self) -> StepLoop:
        """The loaded model at work.  Raises Unavailable."""
        steps = self._steps()
        if steps is None:
            raise Unavailable(
                "The model is not loaded. Ask again when /readyz says so.",
                reason="loading",
                retry_after=10,
            )
        return steps


def _texts(head: HeadView, decode: Callable[[list[int]], str]) -> list[tuple[str, str]]:
    ids = head.token_ids()
    return [
        (decode(ids[turn.start : turn.prompt_end]), decode(ids[turn.prompt_end : turn.end]))
        for turn in head.turns
    ]
