"""What the outside may know of an agent: plain values, made from the store and the pool.

Knows how to count tokens by tier and whose blocks are whose.  Changes nothing.  Any thread.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from agent_memory.block import Block, BlockHash
from agent_memory.kvcache.block_pool import BlockPool
from agent_memory.store.agents import Agent
from agent_memory.store.block_store import BlockStore
from agent_memory.store.heads import Head
from agent_memory.tenants import tenant_of


@dataclass(frozen=True, slots=True)
class TurnView:
    """Tokens [start, prompt_end) were asked, [prompt_end, end) were answered."""

    start: int
    prompt_end: int
    end: int


@dataclass(frozen=True, slots=True)
class HeadView:
    """In tokens, but for `num_blocks`.  `token_ids`: all of the head's, for who wants its text."""

    id: str
    fingerprint: BlockHash
    num_tokens: int
    num_blocks: int
    in_memory: int
    on_disk: int
    last_used: float
    turns: tuple[TurnView, ...]
    chain: tuple[Block, ...]

    def token_ids(self) -> list[int]:
        ids = [token for block in self.chain for token in block.token_ids()]
        return ids[: self.num_tokens]


@dataclass(frozen=True, slots=True)
class AgentView:
    """`heads` has the newest first.  `nbytes`: on disk, of every block and checkpoint it owns,
    shared or not."""

    id: str
    heads: tuple[HeadView, ...]
    own_blocks: int
    shared_blocks: int
    nbytes: int
    bytes_written: int
    pinned: bool
    last_used: float


class AgentViews:
    def __init__(self, store: BlockStore, pool: BlockPool) -> None:
        self._store = store
        self._pool = pool

    def all(self, tenant: str | None) -> list[AgentView]:
        """Those of a tenant, the most recently used first."""
        return [self.one(a) for a in self._store.agents.all() if tenant_of(a.id) == tenant]

    def one(self, agent: Agent) -> AgentView:
        own = {block.hash for head in agent.heads for block in head.chain}
        num_shared = len(own & self._store.agents.shared(agent))
        return AgentView(
            id=agent.id,
            heads=tuple(self._head(head) for head in agent.heads),
            own_blocks=len(own) - num_shared,
            shared_blocks=num_shared,
            nbytes=self._store.bytes_of(agent.owned()),
            bytes_written=agent.bytes_written,
            pinned=agent.pinned,
            last_used=agent.last_used,
        )

    def _head(self, head: Head) -> HeadView:
        parts = list(spans(head))
        starts = (0, *(end for _, end in head.turns))
        return HeadView(
            id=head.id,
            fingerprint=head.fingerprint,
            num_tokens=head.num_tokens,
            num_blocks=len(head.chain),
            in_memory=sum(count for block, count in parts if block.hash in self._pool),
            on_disk=sum(count for block, count in parts if self._store.find(block.hash)),
            last_used=head.last_used,
            turns=tuple(
                TurnView(start, *turn) for start, turn in zip(starts, head.turns, strict=False)
            ),
            chain=head.chain,
        )


def spans(head: Head) -> Iterator[tuple[Block, int]]:
    """(block, how many of its leading tokens the head uses): all of them but in the last."""
    left = head.num_tokens
    for block in head.chain:
        yield block, min(left, block.num_tokens)
        left -= block.num_tokens
