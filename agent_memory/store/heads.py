"""A head: one conversation of an agent, as a chain of blocks and how far into its last one.

Beside its chain it has checkpoints: each is of the chain's first so many tokens, its position.

Knows how conversations compare, to the token, and how one is cut.  Knows nothing of who else there
is.  Values only, any thread.

    chain       [0, 256) [256, 512) [512, 600)      every block but the last is full
    num_tokens  530                                 the last block is used as far as that
    turns       (40, 120), (300, 530)               tokens up to 40 were asked, up to 120 answered
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from agent_memory.block import BLOCK_TOKENS, Block, BlockHash, common_tokens

Chain = tuple[Block, ...]
Turn = tuple[int, int]
"""(end of what was asked, end of what was answered), in tokens from the beginning."""


@dataclass(frozen=True, slots=True)
class Head:
    """`ordinal` is logical and this version's own: the newest of all heads has the highest.
    `first`: that of its first version.  `last_used`: wall seconds, to show to people only.
    `checkpoints` has them by position."""

    ordinal: int
    first: int
    fingerprint: BlockHash
    chain: Chain
    num_tokens: int
    turns: tuple[Turn, ...]
    last_used: float
    checkpoints: Chain = ()

    @property
    def id(self) -> str:
        """Stays while the conversation goes on."""
        return str(self.first)

    @property
    def root(self) -> BlockHash:
        """What stands before its first block."""
        return self.chain[0].parent

    @property
    def blocks(self) -> Chain:
        """All that it owns."""
        return self.chain + self.checkpoints

    @property
    def pieces(self) -> tuple[Chain, ...]:
        return pieces(self.chain, self.checkpoints)

    def begins(self, other: "Head") -> bool:
        return self.agrees(other) == self.num_tokens

    def agrees(self, other: "Head") -> int:
        """How many leading tokens they share."""
        if self.fingerprint != other.fingerprint:
            return 0
        shared = shared_tokens(self.chain, other.chain)
        return min(shared, self.num_tokens, other.num_tokens)

    def cut(self, num_tokens: int) -> "Head":
        """Its first `num_tokens` tokens, at least one."""
        assert 0 < num_tokens <= self.num_tokens
        chain = self.chain[: -(-num_tokens // BLOCK_TOKENS)]
        turns = turns_within(self.turns, num_tokens)
        cut = replace(self, chain=chain, num_tokens=num_tokens, turns=turns, checkpoints=())
        return cut.with_checkpoints(self.checkpoints)

    def with_checkpoints(self, checkpoints: Iterable[Block]) -> "Head":
        """With just those of them that lie in it."""
        found = positions(self.root, self.chain, checkpoints)
        lie_in_it = tuple(found[at] for at in sorted(found) if at <= self.num_tokens)
        return replace(self, checkpoints=lie_in_it)

    def without(self, block: Block) -> "Head | None":
        """What is left of it when this one of its blocks or checkpoints is gone."""
        if block.is_checkpoint:
            return self.with_checkpoints(c for c in self.checkpoints if c != block)
        length = self.chain.index(block)
        return self.cut(BLOCK_TOKENS * length) if length else None

    def check(self) -> None:
        assert self.chain and 0 < self.first <= self.ordinal
        assert all(block.full for block in self.chain[:-1])
        parents = [self.root, *(block.hash for block in self.chain)]
        assert [block.parent for block in self.chain] == parents[:-1]
        assert 0 < self.num_tokens - num_tokens(self.chain[:-1]) <= self.chain[-1].num_tokens
        assert self.turns == turns_within(self.turns, self.num_tokens)
        assert self == self.with_checkpoints(self.checkpoints)
        assert not any(block.is_checkpoint for block in self.chain)


def pieces(chain: Chain, checkpoints: Iterable[Block]) -> tuple[Chain, ...]:
    """Each checkpoint as a chain of one, and the chain."""
    return (*((checkpoint,) for checkpoint in checkpoints), chain)


def num_tokens(chain: Sequence[Block]) -> int:
    """Of a chain in which every block but the last is full."""
    return BLOCK_TOKENS * (len(chain) - 1) + chain[-1].num_tokens if chain else 0


def positions(
    root: BlockHash, chain: Sequence[Block], checkpoints: Iterable[Block]
) -> dict[int, Block]:
    """Which of the checkpoints are of the first so many tokens of the chain."""
    found = dict[int, Block]()
    if offered := tuple(checkpoints):
        starts = {block.hash: BLOCK_TOKENS * n for n, block in enumerate(chain, 1)}
        starts[root] = 0
        following = {block.parent: block.tokens for block in chain}
        for checkpoint in offered:
            assert checkpoint.is_checkpoint
            start = starts.get(checkpoint.parent)
            same = following.get(checkpoint.parent, b"").startswith(checkpoint.tokens)
            if start is not None and same:
                found[start + checkpoint.num_tokens] = checkpoint
    return found


def shared_tokens(a: Sequence[Block], b: Sequence[Block]) -> int:
    """How many leading tokens two chains share.  A hash stands for all before it too."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        same = a[middle - 1].hash == b[middle - 1].hash
        low, high = (middle, high) if same else (low, middle - 1)
    shared = num_tokens(a[:low])
    if low < min(len(a), len(b)) and a[low].parent == b[low].parent:
        shared += common_tokens(a[low].tokens, b[low].tokens)
    return shared


def turns_within(turns: Iterable[Turn], limit: int) -> tuple[Turn, ...]:
    """Those that lie wholly in the first `limit` tokens, one after another."""
    kept: list[Turn] = []
    for prompt_end, end in turns:
        start = kept[-1][1] if kept else 0
        if start < prompt_end <= end <= limit:
            kept.append((prompt_end, end))
    return tuple(kept)
