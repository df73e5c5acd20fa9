"""Who owns what: agents and their heads.

Knows which chain continues which, and of every block and checkpoint whose heads hold it: those own
it, and with none it is anonymous.  Knows nothing of files or of what is present.  Memory only; any
thread, one lock.

No head of an agent begins a newer one of the same fingerprint.

    recorded              heads before             heads after, newest first
    A B c                 -                        A B c
    A B cd                A B c                    A B cd                     c may be let go
    A B C D               A B, A x                 A B C D, A x
    A                     A B, A x                 A B, A x                   A B is used again
    rewound to A          A B, A x                 A, A x                     B may be let go
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from threading import Lock

from agent_memory.block import Block, BlockHash, root_of
from agent_memory.errors import Conflict, NotFound
from agent_memory.store.heads import Chain, Head, Turn, num_tokens, pieces, turns_within
from agent_memory.store.owners import Owners
from agent_memory.tenants import outside, tenant_of

MAX_HEADS = 8
"""Per agent and fingerprint; the oldest goes."""


class Rank(IntEnum):
    """Who must do without a block.  The lowest go first when there is no room."""

    ANONYMOUS = 0
    OWNED = 1
    PINNED = 2


@dataclass(frozen=True, slots=True)
class Agent:
    """A snapshot.  `heads` has the newest first and is never empty.  `bytes_written`: of block
    files that were first written in its name."""

    id: str
    heads: tuple[Head, ...]
    pinned: bool = False
    bytes_written: int = 0

    @property
    def last_used(self) -> float:
        return self.heads[0].last_used

    def owned(self) -> set[BlockHash]:
        """Blocks and checkpoints."""
        return {block.hash for head in self.heads for block in head.blocks}

    def head(self, head_id: str | None) -> Head:
        """The newest, or the one that is named.  Raises NotFound."""
        if head_id is None:
            return self.heads[0]
        found = next((head for head in self.heads if head.id == head_id), None)
        if found is None:
            ids = ", ".join(f"'{head.id}'" for head in self.heads)
            raise NotFound(
                f"'{outside(self.id)}' has no head '{head_id}'. It has {ids}.",
                param="head",
                code="head_not_found",
            )
        return found


@dataclass(frozen=True, slots=True)
class Changed:
    """An agent as it is now.  `loose`: chains whose blocks nobody may own any more, and before
    them checkpoints that nobody owns, each as a chain of one."""

    agent: Agent
    loose: tuple[Chain, ...] = ()


@dataclass(frozen=True, slots=True)
class Cut:
    """Whose heads have lost something, and checkpoints that were lost with it and are nobody's."""

    agents: set[str]
    loose: tuple[Chain, ...]


class Agents:
    def __init__(self) -> None:
        self._lock = Lock()
        # Guarded by the lock.
        self._agents: dict[str, Agent] = {}
        self._owners = Owners()
        self._of: dict[int, str] = {}  # whose head that is
        self._early: dict[str, int] = {}  # written for names that own nothing yet
        self._last_ordinal = 0
        self._num_demotions = 0

    # ── asked ────────────────────────────────────────────────────────────────────────────────

    def get(self, agent_id: str) -> Agent | None:
        with self._lock:
            return self._agents.get(agent_id)

    def known(self, agent_id: str) -> Agent:
        """Raises NotFound."""
        with self._lock:
            return self._known(agent_id)

    def all(self) -> list[Agent]:
        """The most recently used first."""
        with self._lock:
            return sorted(self._agents.values(), key=lambda a: a.heads[0].ordinal, reverse=True)

    def owns(self, block_hash: BlockHash) -> bool:
        """Whether anybody does."""
        with self._lock:
            return block_hash in self._owners

    def shared(self, agent: Agent) -> set[BlockHash]:
        """Blocks and checkpoints of it that other agents have in mind, too."""
        with self._lock:
            return {
                block_hash
                for block_hash in agent.owned()
                if any(self._of[ordinal] != agent.id for ordinal in self._owners.of(block_hash))
            }

    def rank(self, block_hash: BlockHash) -> Rank:
        with self._lock:
            owners = self._owners.of(block_hash)
            if not owners:
                return Rank.ANONYMOUS
            pinned = any(self._agents[self._of[ordinal]].pinned for ordinal in owners)
            return Rank.PINNED if pinned else Rank.OWNED

    @property
    def num_demotions(self) -> int:
        """Goes up whenever blocks may have got a lower rank."""
        with self._lock:
            return self._num_demotions

    # ── changed ──────────────────────────────────────────────────────────────────────────────

    def load(self, agent_id: str, head: Head) -> None:
        """A head found at start; they come oldest first."""
        with self._lock:
            if not self._last_ordinal < head.ordinal < 1 << 62:
                head = replace(head, ordinal=self._last_ordinal + 1)
            own = self._agents.get(agent_id)
            if head.first > head.ordinal or (own and head.id in {other.id for other in own.heads}):
                head = replace(head, first=head.ordinal)
            self._last_ordinal = head.ordinal
            self._enter(agent_id, head)

    def load_facts(self, agent_id: str, *, pinned: bool, bytes_written: int) -> None:
        """What else was found of it; nothing if it has no heads any more."""
        with self._lock:
            if agent := self._agents.get(agent_id):
                self._agents[agent_id] = replace(agent, pinned=pinned, bytes_written=bytes_written)

    def record(
        self,
        agent_id: str,
        fingerprint: BlockHash,
        chain: Chain,
        last_used: float,
        turn: Turn | None = None,
        checkpoints: Chain = (),
        passed: Chain = (),
    ) -> Changed:
        """The agent's newest head is `chain`, or the head that already goes further.

        Its turns are those that lie in what it shares with a head, and then `turn`.  It has just
        the checkpoints given that lie in it; one that goes further also keeps its own.  `passed`:
        blocks that may be loose now, each the last after its parent.
        """
        with self._lock:
            own = self._heads(agent_id, fingerprint)
            head = self._new(agent_id, fingerprint, chain, num_tokens(chain), last_used)
            kept: Chain = ()
            if whole := next((other for other in own if head.begins(other)), None):
                head = replace(whole, ordinal=head.ordinal, last_used=last_used)
                kept = whole.checkpoints
            else:
                turns = _turns_continued(head, own) + ((turn,) if turn else ())
                head = replace(head, turns=turns_within(turns, head.num_tokens))
            head = head.with_checkpoints(kept + checkpoints)
            return self._enter(agent_id, head, pieces(chain, checkpoints + passed))

    def adopt(
        self,
        agent_id: str,
        fingerprint: BlockHash,
        chain: Chain,
        last_used: float,
        turns: Iterable[Turn],
        used_tokens: int | None = None,
        checkpoints: Chain = (),
    ) -> Changed:
        """A head made elsewhere.  `used_tokens`: how many of the chain's are used, None for all."""
        with self._lock:
            head = self._new(agent_id, fingerprint, chain, num_tokens(chain), last_used)
            head = replace(head, turns=turns_within(turns, head.num_tokens))
            head = head.with_checkpoints(checkpoints).cut(used_tokens or head.num_tokens)
            return self._enter(agent_id, head, pieces(chain, checkpoints))

    def fork(self, agent_id: str, new_id: str, head_id: str | None, last_used: float) -> Changed:
        """A new agent with one head of another.  Raises NotFound or Conflict."""
        with self._lock:
            head = self._known(agent_id).head(head_id)
            if new_id in self._agents:
                raise Conflict(
                    f"There is an agent '{outside(new_id)}' already. Choose another name, or "
                    "remove that one first.",
                    param="name",
                    code="agent_exists",
                )
            new = self._new(new_id, head.fingerprint, head.chain, head.num_tokens, last_used)
            new = replace(new, turns=head.turns, checkpoints=head.checkpoints)
            return self._enter(new_id, new)

    def rewind(
        self, agent_id: str, used_tokens: int, head_id: str | None, last_used: float
    ) -> Changed:
        """The head's first tokens are now the newest head.  Raises NotFound or Conflict."""
        with self._lock:
            head = self._known(agent_id).head(head_id)
            if not 0 < used_tokens <= head.num_tokens:
                raise Conflict(
                    f"The conversation has {head.num_tokens} tokens, so it cannot be rewound to "
                    f"{used_tokens}. Name a number from 1 to {head.num_tokens}.",
                    param="tokens",
                    code="beyond_the_end",
                )
            self._last_ordinal += 1
            new = replace(head.cut(used_tokens), ordinal=self._last_ordinal, last_used=last_used)
            self._leave(agent_id, [head])
            return self._enter(agent_id, new, head.pieces)

    def set_pinned(self, agent_id: str, pinned: bool) -> Changed:
        """Raises NotFound."""
        with self._lock:
            self._agents[agent_id] = agent = replace(self._known(agent_id), pinned=pinned)
            self._num_demotions += not pinned
            return Changed(agent)

    def remove(self, agent_id: str) -> Changed:
        """The agent as it was.  Raises NotFound."""
        with self._lock:
            agent = self._known(agent_id)
            self._leave(agent_id, agent.heads)
            del self._agents[agent_id]
            gone = (piece for head in agent.heads for piece in head.pieces)
            return Changed(agent, self._owners.loose(gone))

    def cut(self, block: Block) -> Cut:
        """It is no more.  Every head that holds it does without if it is a checkpoint, and ends
        before it if not."""
        with self._lock:
            owners = list(self._owners.of(block.hash))
            changed = {self._of[ordinal] for ordinal in owners}
            lost = [c for ordinal in owners for c in self._cut(ordinal, block)]
            others = ((c,) for c in dict.fromkeys(lost) if c != block)
            return Cut(changed, self._owners.loose(others))

    def credit(self, agent_id: str, num_bytes: int) -> None:
        """So much was written in its name, maybe before it owns anything."""
        with self._lock:
            if agent := self._agents.get(agent_id):
                written = agent.bytes_written + num_bytes
                self._agents[agent_id] = replace(agent, bytes_written=written)
            else:
                self._early[agent_id] = self._early.get(agent_id, 0) + num_bytes

    # ── under the lock ───────────────────────────────────────────────────────────────────────

    def _known(self, agent_id: str) -> Agent:
        agent = self._agents.get(agent_id)
        if agent is None:
            raise NotFound(
                f"Nothing is remembered of an agent '{outside(agent_id)}'.", code="agent_not_found"
            )
        return agent

    def _heads(self, agent_id: str, fingerprint: BlockHash) -> list[Head]:
        """Newest first."""
        agent = self._agents.get(agent_id)
        heads = agent.heads if agent else ()
        return [head for head in heads if head.fingerprint == fingerprint]

    def _new(
        self, agent_id: str, fingerprint: BlockHash, chain: Chain, tokens: int, last_used: float
    ) -> Head:
        assert chain and chain[0].parent == root_of(fingerprint, tenant_of(agent_id))
        self._last_ordinal += 1
        ordinal = self._last_ordinal
        return Head(ordinal, ordinal, fingerprint, chain, tokens, (), last_used)

    def _enter(self, agent_id: str, head: Head, offered: Iterable[Chain] = ()) -> Changed:
        """`head` is the agent's newest.  Those that begin it go, and the oldest that is too many.

        Of those that begin it the newest is the one that it continues.  `offered`: what else may be
        loose now.
        """
        own = self._heads(agent_id, head.fingerprint)
        replaced = [other for other in own if other.begins(head)]
        kept = [other for other in own if other not in replaced]
        goes = replaced + kept[MAX_HEADS - 1 :]
        if replaced and head.first == head.ordinal:
            head = replace(head, first=replaced[0].first)
        self._leave(agent_id, goes)

        agent = self._agents.get(agent_id)
        if agent is None:
            agent = Agent(agent_id, (), bytes_written=self._early.pop(agent_id, 0))
        self._agents[agent_id] = agent = replace(agent, heads=(head, *agent.heads))
        self._of[head.ordinal] = agent_id
        self._owners.add(head.ordinal, head.blocks)
        gone = (piece for other in goes for piece in other.pieces)
        return Changed(agent, self._owners.loose((*offered, *gone)))

    def _leave(self, agent_id: str, heads: Sequence[Head]) -> None:
        """Take heads away.  An agent that has none left must get one or go before the lock does."""
        for head in heads:
            del self._of[head.ordinal]
            self._owners.remove(head.ordinal, head.blocks)
        if heads:
            agent = self._agents[agent_id]
            self._num_demotions += agent.pinned
            left = tuple(head for head in agent.heads if head not in heads)
            self._agents[agent_id] = replace(agent, heads=left)

    def _cut(self, ordinal: int, block: Block) -> Chain:
        """-> the checkpoints that the head has lost"""
        agent = self._agents[self._of[ordinal]]
        heads = list(agent.heads)
        i = next(i for i, head in enumerate(heads) if head.ordinal == ordinal)
        head, short = heads[i], heads[i].without(block)
        if short and any(short.begins(newer) for newer in heads[:i]):
            short = None
        heads[i : i + 1] = [short] if short else []
        if short is None:
            del self._of[ordinal]
        self._agents[agent.id] = replace(agent, heads=tuple(heads))
        if not heads:
            del self._agents[agent.id]
        left = short.checkpoints if short else ()
        lost = tuple(c for c in head.checkpoints if c not in left)
        self._owners.remove(ordinal, head.chain[len(short.chain) if short else 0 :] + lost)
        self._num_demotions += agent.pinned and bool(lost)
        return lost

    def check(self) -> None:
        with self._lock:
            for agent_id, agent in self._agents.items():
                assert agent.id == agent_id and agent.heads and agent.bytes_written >= 0
                ordinals = [head.ordinal for head in agent.heads]
                assert ordinals == sorted(set(ordinals), reverse=True)
                assert ordinals[0] <= self._last_ordinal
                assert len({head.id for head in agent.heads}) == len(ordinals)
                assert {self._of[ordinal] for ordinal in ordinals} == {agent_id}
                tenant = tenant_of(agent_id)
                assert all(h.root == root_of(h.fingerprint, tenant) for h in agent.heads)
                _check_heads(agent.heads)
            self._owners.check(head for agent in self._agents.values() for head in agent.heads)
            assert len(self._of) == sum(len(agent.heads) for agent in self._agents.values())


def _turns_continued(head: Head, own: Sequence[Head]) -> tuple[Turn, ...]:
    """Of the head that shares most with `head`, the turns that lie in what they share."""
    shared, turns = 0, tuple[Turn, ...]()
    for other in own:
        if (agreed := other.agrees(head)) > shared:
            shared, turns = agreed, other.turns
    return turns_within(turns, shared)


def _check_heads(heads: Sequence[Head]) -> None:
    for i, head in enumerate(heads):
        head.check()
        assert sum(head.fingerprint == other.fingerprint for other in heads) <= MAX_HEADS
        assert not any(older.begins(head) for older in heads[i + 1 :])
