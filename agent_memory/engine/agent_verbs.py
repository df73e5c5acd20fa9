"""What people do with an agent's memory: look, fork, rewind, pin, warm, remove.

Agent ids are those of the inside, see tenants.py; errors have them as the tenant does.  Knows which
of it needs the engine thread and which a model.  What is only memory is done here and now; the
store brings it to disk.  Event loop.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from agent_memory.engine.agent_views import AgentView, AgentViews, HeadView
from agent_memory.engine.mailbox import Mailbox
from agent_memory.engine.models import Models
from agent_memory.engine.residents import Residents
from agent_memory.engine.served import Loaded
from agent_memory.errors import Conflict, Unavailable
from agent_memory.store.block_store import BlockStore
from agent_memory.tenants import outside

WARM_S = 60.0
FLUSH_S = 30.0


class AgentVerbs:
    """`on_removed`: told the name of every agent that was removed, as soon as it is forgotten."""

    def __init__(
        self, store: BlockStore, residents: Residents, mailbox: Mailbox, models: Models
    ) -> None:
        self._store = store
        self._residents = residents
        self._mailbox = mailbox
        self._models = models
        self._views = AgentViews(store, residents.pool)
        self.on_removed: list[Callable[[str], object]] = []

    def all(self, tenant: str | None) -> list[AgentView]:
        """Those of a tenant, the most recently used first."""
        return self._views.all(tenant)

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
        """Bring its newest head to RAM, as far as there is room, and the model it is of."""
        newest = self._store.agents.known(agent_id).heads[0]
        own = self._models.of_fingerprint(newest.fingerprint)
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # who gives up waiting must not end it for the engine
        try:
            async with self._models.use(own.name if own else None) as served:
                warmed = partial(done.set_result, None)
                self._mailbox.send(partial(self._residents.warm, served.name, agent_id, warmed))
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
        being answered, and Unavailable when it is forgotten, but not yet by the disk."""
        await asyncio.wrap_future(self._mailbox.call(partial(self._remove, agent_id)))
        for told in self.on_removed:
            told(agent_id)
        if not await asyncio.to_thread(self._store.saved, FLUSH_S):
            raise Unavailable(
                f"'{outside(agent_id)}' is forgotten, but its files are not deleted yet. They will "
                "be.",
                reason="busy",
                retry_after=5,
            )

    def _remove(self, agent_id: str) -> None:
        """Engine thread: between two steps nobody commits."""
        self._store.agents.known(agent_id)
        if self._residents.is_answering(agent_id):
            raise Conflict(
                f"'{outside(agent_id)}' is being answered now and would be remembered again. Wait "
                "for the answer, or end the request, and ask again.",
                code="agent_in_use",
            )
        for block_hash in self._store.remove(agent_id):
            self._residents.pool.drop(block_hash)
        self._residents.forget(agent_id)

    async def texts(self, head: HeadView) -> list[tuple[str, str]] | None:
        """What was asked and answered in each of its turns; None if of a model that is not loaded.
        Raises Unavailable while it may be that it will be."""
        served = self._models.of_fingerprint(head.fingerprint)
        if served is not None and served.phase is Loaded.READY:
            return await asyncio.to_thread(_texts, head, served.tokenizer.decode)
        self._models.facts(None)
        return None


def _texts(head: HeadView, decode: Callable[[list[int]], str]) -> list[tuple[str, str]]:
    ids = head.token_ids()
    return [
        (decode(ids[turn.start : turn.prompt_end]), decode(ids[turn.prompt_end : turn.end]))
        for turn in head.turns
    ]
