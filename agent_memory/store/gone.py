"""Blocks that were remembered and are no more, and why: so that a miss can be explained.

Knows names only, no token can be read back from it.  A block that has come back is still listed:
ask only about blocks that are absent.  Memory only, bounded, empty at every start; any thread, one
lock.
"""

from collections import OrderedDict
from threading import Lock

from agent_memory.block import Block, BlockHash, Loss

MOST = 10_000
_TRIES = 16
"""Partial blocks after one parent that are compared, the latest losses first."""


class Gone:
    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._lock = Lock()
        # Guarded by the lock.  The oldest loss first; `_partial`: lengths by parent.
        self._losses: OrderedDict[BlockHash, tuple[BlockHash, Loss]] = OrderedDict()
        self._partial: dict[BlockHash, dict[BlockHash, int]] = {}

    def note(self, block: Block, loss: Loss) -> None:
        if block.is_checkpoint:
            return  # no token is lost with it
        with self._lock:
            self._drop(block.hash)
            self._losses[block.hash] = block.parent, loss
            if not block.full:
                self._partial.setdefault(block.parent, {})[block.hash] = block.num_tokens
            if len(self._losses) > self._most:
                self._drop(next(iter(self._losses)))

    def why(self, block_hash: BlockHash) -> Loss | None:
        with self._lock:
            known = self._losses.get(block_hash)
            return known[1] if known else None

    def beginning(self, parent: BlockHash, tokens: bytes) -> tuple[int, Loss] | None:
        """The longest partial block after `parent` that `tokens` begin with: (tokens, why)."""
        with self._lock:
            listed = list(self._partial.get(parent, {}).items())[-_TRIES:]
        longest_first = sorted(listed, key=lambda item: -item[1])
        for block_hash, count in longest_first:
            fits = 4 * count <= len(tokens)
            if fits and Block.of(parent, tokens[: 4 * count]).hash == block_hash:
                loss = self.why(block_hash)
                return (count, loss) if loss else None
        return None

    def _drop(self, block_hash: BlockHash) -> None:
        known = self._losses.pop(block_hash, None)
        if known is None:
            return
        siblings = self._partial.get(known[0], {})
        siblings.pop(block_hash, None)
        if not siblings:
            self._partial.pop(known[0], None)

    def check(self) -> None:
        with self._lock:
            assert len(self._losses) <= self._most
            assert all(self._partial.values())
            for parent, siblings in self._partial.items():
                assert all(self._losses[block_hash][0] == parent for block_hash in siblings)
