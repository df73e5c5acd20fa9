"""Beside what a prompt is laid when its memory has been looked for: where it parts, and from what.

Knows tokens and names of blocks only; what a difference means, engine/explain.py says.  Remembers
the names of each agent's last chain, to know that something was there although nothing of it is.
Engine thread; `forget` from any.

Asked in this order, the first that holds is the finding:

    whole         all but the prompt's last token was found
    lost          the next block was remembered: the agent's head holds it, the store has lost it,
                  or it was in the agent's last chain
    other_model   another model's chain of this agent goes further, or is all that it has
    whole, own    the agent's closest head ends here, or goes on otherwise
    whole, others the chain that matched ends here, or goes on otherwise; whose it is, nobody knows
    nothing       no chain begins like this
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence

from agent_memory.block import BLOCK_TOKENS, Block, BlockHash, Loss, chain, common_tokens
from agent_memory.kvcache.block_pool import BlockPool
from agent_memory.request import Compared, Finding
from agent_memory.store.block_store import BlockStore
from agent_memory.store.heads import Head

SHOWN_TOKENS = 4096
"""Of the other chain are handed on, from where it parts."""
MAX_NAMES = 100_000
_BY_CHANCE = 16
"""Tokens: so much more may another model's chain share for no reason but that both are chats."""

Chain = Sequence[Block]


class Witness:
    def __init__(self, fingerprint: BlockHash, pool: BlockPool, store: BlockStore) -> None:
        self._fingerprint = fingerprint
        self._pool = pool
        self._store = store
        # The agent used last comes last.  Names, and the length of the last block.
        self._last: OrderedDict[str, tuple[tuple[BlockHash, ...], int]] = OrderedDict()
        self._num_names = 0

    def saw(self, agent_id: str, kept: Chain) -> None:
        """The agent's turn has ended with the chain `kept`."""
        self.forget(agent_id)
        self._last[agent_id] = tuple(block.hash for block in kept), kept[-1].num_tokens
        self._num_names += len(kept)
        while self._num_names > MAX_NAMES:
            self.forget(next(iter(self._last)))

    def left_out(self, parent: BlockHash, tokens: Sequence[int]) -> None:
        """What the turn had computed behind `parent` and there was no room for."""
        for block in chain(parent, tokens):
            self._store.gone.note(block, Loss.NO_ROOM)

    def forget(self, agent_id: str) -> None:
        names, _ = self._last.pop(agent_id, ((), 0))
        self._num_names -= len(names)

    def compare(
        self, agent_id: str | None, root: BlockHash, prompt: bytes, matched: int, blocks: Chain
    ) -> Compared:
        """`prompt`: token bytes of what was looked for behind `root`; so many leading tokens of it
        were found in `blocks`, of which the last may go on."""
        if 4 * matched >= len(prompt):
            return Compared(matched, Finding.WHOLE)
        full = blocks[: matched // BLOCK_TOKENS]
        heads = self._heads(agent_id)
        own = [head for head in heads if head.fingerprint == self._fingerprint]
        ranked = [(_shared(head, prompt, full), head) for head in own]
        common, closest = max(ranked, key=lambda pair: pair[0], default=(0, None))
        loss = self._lost(closest, common, matched) or self._gone(
            *(agent_id, full[-1].hash if full else root, prompt, matched, len(full))
        )
        if loss is not None:
            return Compared(matched, Finding.LOST, loss=loss)
        if self._is_elsewhere(heads, prompt, matched if own else -1):
            return Compared(matched, Finding.OTHER_MODEL)
        if closest is not None and common == matched:
            return _parting(matched, Finding.OWN, _after(closest, matched))
        return _parting(matched, Finding.OTHERS, self._others_after(root, blocks, matched))

    def _heads(self, agent_id: str | None) -> tuple[Head, ...]:
        agent = self._store.agents.get(agent_id) if agent_id is not None else None
        return agent.heads if agent else ()

    def _lost(self, head: Head | None, common: int, matched: int) -> Loss | None:
        """The agent's head goes further with this prompt than the blocks that are there."""
        if head is None or common <= matched:
            return None
        return self._store.gone.why(head.chain[matched // BLOCK_TOKENS].hash) or Loss.EVICTED

    def _gone(
        self, agent_id: str | None, parent: BlockHash, prompt: bytes, matched: int, num_full: int
    ) -> Loss | None:
        """The prompt goes on behind `parent` as blocks did that are known by name only."""
        gone, rest = self._store.gone, _block(prompt, num_full)
        names, last_length = self._last.get(agent_id or "", ((), 0))
        if len(rest) == 4 * BLOCK_TOKENS:
            following = Block.of(parent, rest).hash
            if loss := gone.why(following):
                return loss
            if following in names[num_full : num_full + 1]:
                return Loss.EVICTED
        least = matched - num_full * BLOCK_TOKENS
        ended = gone.beginning(parent, rest)
        if ended and ended[0] > least:
            return ended[1]
        if len(names) == num_full + 1 and least < last_length <= len(rest) // 4:
            if Block.of(parent, rest[: 4 * last_length]).hash == names[-1]:
                return Loss.EVICTED
        return None

    def _is_elsewhere(self, heads: Sequence[Head], prompt: bytes, matched: int) -> bool:
        """The newest head of another model shares clearly more than `matched` tokens."""
        other = next((head for head in heads if head.fingerprint != self._fingerprint), None)
        if other is None or matched < 0:
            return other is not None
        return _shared(other, prompt, ()) > matched + _BY_CHANCE

    def _others_after(self, root: BlockHash, blocks: Chain, matched: int) -> bytes:
        """How what matched goes on, whoever computed it: at each parting the latest way."""
        parent, rest = root, b""
        if blocks:
            within = matched % BLOCK_TOKENS or BLOCK_TOKENS
            parent, rest = blocks[-1].hash, blocks[-1].tokens[4 * within :]
        while len(rest) < 4 * SHOWN_TOKENS:
            children = _of_tokens(self._store.children(parent))
            children = children or _of_tokens(self._pool.children(parent))
            if not children:
                break
            parent, rest = children[-1].hash, rest + children[-1].tokens
        return rest[: 4 * SHOWN_TOKENS]

    def check(self) -> None:
        assert self._num_names == sum(len(names) for names, _ in self._last.values())
        assert self._num_names <= MAX_NAMES


def _parting(position: int, finding: Finding, remembered: bytes) -> Compared:
    """Where nothing follows, nothing differs."""
    if remembered:
        return Compared(position, finding, remembered)
    return Compared(position, Finding.WHOLE if position else Finding.NOTHING)


def _of_tokens(children: Chain) -> Chain:
    return [block for block in children if not block.is_checkpoint]


def _block(prompt: bytes, at: int) -> bytes:
    return prompt[4 * BLOCK_TOKENS * at : 4 * BLOCK_TOKENS * (at + 1)]


def _shared(head: Head, prompt: bytes, known: Chain) -> int:
    """Leading tokens that both have.  `known`: the prompt's full blocks by name; where names are
    equal nothing else is compared."""
    own, most = head.chain, min(len(head.chain), len(known))
    at = bisect_left(range(most), 1, key=lambda i: int(own[i].hash != known[i].hash))
    while at < len(own) and own[at].full and own[at].tokens == _block(prompt, at):
        at += 1
    count = common_tokens(own[at].tokens, _block(prompt, at)) if at < len(own) else 0
    return min(at * BLOCK_TOKENS + count, head.num_tokens)


def _after(head: Head, position: int) -> bytes:
    first, within = divmod(position, BLOCK_TOKENS)
    num_blocks = SHOWN_TOKENS // BLOCK_TOKENS + 1
    following = b"".join(block.tokens for block in head.chain[first : first + num_blocks])
    count = min(head.num_tokens - position, SHOWN_TOKENS)
    return following[4 * within : 4 * (within + count)]
