"""Who owns what: agents and the heads of their chains.

Knows which chain continues which.  Knows nothing of files or of what is present.  Memory only;
any thread, one lock.

A head is a chain that is no prefix of another head of the same agent and fingerprint.  Prefixes are
exact to the token: `a` is a prefix of `b` if `b` has, where `a` ends, a block with the same parent
whose tokens begin with those of `a`'s last block.  The parent's hash stands for all before it.

    recorded chain        heads before             heads after, newest first
    A B c                 -                        A B c
    A B cd                A B c                    A B cd                     c is superseded
    A B C D               A B, A x                 A B C D, A x
    A                     A B, A x                 A B, A x                   A B is used again
"""

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

from agent_memory.block import Block, BlockHash

MAX_HEADS = 8
"""Per agent and fingerprint; the oldest goes."""

Chain = tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Head:
    """`ordinal` is logical: the newest head of all has the highest.  `last_used`: wall seconds, to
    show to people only."""

    ordinal: int
    fingerprint: BlockHash
    chain: Chain
    last_used: float

    @property
    def num_tokens(self) -> int:
        return sum(block.num_tokens for block in self.chain)


@dataclass(frozen=True, slots=True)
class Agent:
    """A snapshot.  `heads` has the newest first and is never empty."""

    id: str
    heads: tuple[Head, ...]

    @property
    def last_used(self) -> float:
        return self.heads[0].last_used


@dataclass(frozen=True, slots=True)
class Recorded:
    """What one record changed.  `gone`: ordinals that the new head replaces or pushes out.
    `superseded`: partial blocks that no head ends with any more."""

    head: Head
    gone: tuple[int, ...]
    superseded: Chain


def is_prefix(short: Sequence[Block], long: Sequence[Block]) -> bool:
    if len(short) > len(long):
        return False
    last, there = short[-1], long[len(short) - 1]
    return there.parent == last.parent and there.tokens.startswith(last.tokens)


class Agents:
    def __init__(self) -> None:
        self._lock = Lock()
        # Guarded by the lock.
        self._agents: dict[str, Agent] = {}
        self._last_ordinal = 0

    def get(self, agent_id: str) -> Agent | None:
        with self._lock:
            return self._agents.get(agent_id)

    def all(self) -> list[Agent]:
        """The most recently used first."""
        with self._lock:
            return sorted(self._agents.values(), key=lambda a: a.heads[0].ordinal, reverse=True)

    def record(
        self, agent_id: str, fingerprint: BlockHash, chain: Chain, last_used: float
    ) -> Recorded:
        """The agent's newest head is `chain`, or the head that already goes further."""
        assert chain and chain[0].parent == fingerprint
        with self._lock:
            agent = self._agents.get(agent_id)
            heads = agent.heads if agent else ()
            own = [head for head in heads if head.fingerprint == fingerprint]
            whole = next((head.chain for head in own if is_prefix(chain, head.chain)), chain)
            replaced = [head for head in own if is_prefix(head.chain, whole)]
            pushed_out = [head for head in own if head not in replaced][MAX_HEADS - 1 :]
            gone = {head.ordinal for head in (*replaced, *pushed_out)}

            self._last_ordinal += 1
            new = Head(self._last_ordinal, fingerprint, whole, last_used)
            kept = (head for head in heads if head.ordinal not in gone)
            self._agents[agent_id] = Agent(agent_id, (new, *kept))
            return Recorded(new, tuple(gone), self._superseded(replaced))

    def check(self) -> None:
        with self._lock:
            for agent_id, agent in self._agents.items():
                assert agent.id == agent_id and agent.heads
                ordinals = [head.ordinal for head in agent.heads]
                assert ordinals == sorted(set(ordinals), reverse=True)
                assert ordinals[0] <= self._last_ordinal
                _check_heads(agent.heads)

    def _superseded(self, replaced: list[Head]) -> Chain:
        tails = {head.chain[-1].hash: head.chain[-1] for head in replaced}
        partial = [tail for tail in tails.values() if not tail.full]
        if not partial:
            return ()
        held = {head.chain[-1].hash for agent in self._agents.values() for head in agent.heads}
        return tuple(tail for tail in partial if tail.hash not in held)


def _check_heads(heads: Sequence[Head]) -> None:
    """A partial block ends a chain; no head is a prefix of another of its fingerprint."""
    for head in heads:
        assert all(block.full for block in head.chain[:-1])
        parents = [head.fingerprint, *(block.hash for block in head.chain)]
        assert [block.parent for block in head.chain] == parents[:-1]
        same = [other for other in heads if other.fingerprint == head.fingerprint]
        assert len(same) <= MAX_HEADS
        assert sum(is_prefix(head.chain, other.chain) for other in same) == 1
