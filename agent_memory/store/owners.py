"""Which heads own each block and each checkpoint.

Knows heads by their ordinals only.  Under the lock of whoever keeps it.
"""

from collections.abc import Iterable, Set

from agent_memory.block import Block, BlockHash
from agent_memory.store.heads import Chain, Head

_NOBODY: frozenset[int] = frozenset()


class Owners:
    def __init__(self) -> None:
        self._of: dict[BlockHash, set[int]] = {}

    def __contains__(self, block_hash: BlockHash) -> bool:
        """Whether anybody owns it."""
        return block_hash in self._of

    def of(self, block_hash: BlockHash) -> Set[int]:
        return self._of.get(block_hash, _NOBODY)

    def add(self, ordinal: int, blocks: Iterable[Block]) -> None:
        for block in blocks:
            self._of.setdefault(block.hash, set()).add(ordinal)

    def remove(self, ordinal: int, blocks: Iterable[Block]) -> None:
        for block in blocks:
            owners = self._of[block.hash]
            owners.remove(ordinal)
            if not owners:
                del self._of[block.hash]

    def loose(self, pieces: Iterable[Chain]) -> tuple[Chain, ...]:
        """Those whose ends are nobody's, checkpoints first: they come after blocks of chains."""
        loose = [piece for piece in pieces if piece[-1].hash not in self._of]
        return tuple(sorted(loose, key=lambda piece: not piece[0].is_checkpoint))

    def check(self, heads: Iterable[Head]) -> None:
        expected = Owners()
        for head in heads:
            expected.add(head.ordinal, head.blocks)
        assert self._of == expected._of
