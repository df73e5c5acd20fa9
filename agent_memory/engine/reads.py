"""Blocks on their way from disk to the pool: each is read once, however many wait for it.

Knows what is being read and for whom, and what was read ahead of any use.  Knows nothing of runs or
sequences.  Engine thread; the store's threads answer through `post`.
"""

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np

from agent_memory.block import Block, BlockHash
from agent_memory.kv_spec import KVSpec
from agent_memory.kvcache.block_pool import BlockPool
from agent_memory.store.block_store import BlockStore

Post = Callable[[Callable[[], object]], None]
Landed = Callable[[np.ndarray | None, bool], object]
"""(payload, held): None when the block could not be read; held: the pool keeps it, once for us."""


class Reads:
    def __init__(self, spec: KVSpec, pool: BlockPool, store: BlockStore, post: Post) -> None:
        self._spec = spec
        self._pool = pool
        self._store = store
        self._post = post
        self._waiting: dict[BlockHash, list[Landed]] = {}
        self._ahead: set[BlockHash] = set()

    def want(self, block: Block, landed: Landed) -> None:
        """`landed` is called when the block is here, or cannot be."""
        if block.hash in self._waiting:
            self._waiting[block.hash].append(landed)
        else:
            self._begin(block, [landed])

    def ahead(self, chain: Iterable[Block], most_bytes: int) -> None:
        """Bring the beginning of a chain to the pool before anybody asks for it."""
        self._ahead = {block_hash for block_hash in self._ahead if block_hash in self._pool}
        for block in chain:
            if block.hash in self._pool or block.hash in self._waiting:
                continue
            most_bytes -= self._spec.bytes_of(block)
            if most_bytes < 0 or self._store.find(block.hash) is None:
                return
            self._begin(block, [])

    def bring(self, chain: Iterable[Block], done: Callable[[], object]) -> None:
        """Bring the beginning of a chain to the pool, as far as it has room; then call `done`."""
        room, missing = self._pool.budget_bytes, list[Block]()
        for block in chain:
            room -= self._spec.bytes_of(block)
            if block.hash not in self._pool:
                if room < 0 or self._store.find(block.hash) is None:
                    break
                missing.append(block)
        left = len(missing)

        def landed(block: Block, _payload: np.ndarray | None, held: bool) -> None:
            nonlocal left
            if held:
                self._pool.release(block.hash)
            left -= 1
            if left == 0:
                done()

        for block in missing:
            self.want(block, partial(landed, block))
        if not missing:
            done()

    def from_disk(self, block_hash: BlockHash) -> bool:
        """Whether a use now is the first since the block was on disk only.  Asking is a use."""
        ahead = block_hash in self._ahead
        self._ahead.discard(block_hash)
        return ahead or block_hash not in self._pool

    def _begin(self, block: Block, waiting: list[Landed]) -> None:
        self._waiting[block.hash] = waiting

        def deliver(_block: Block, payload: np.ndarray | None) -> None:
            self._post(lambda: self._landed(block, payload))

        self._store.read(block, self._spec, deliver)

    def _landed(self, block: Block, payload: np.ndarray | None) -> None:
        """A block that the full pool has no room for is used by those who wait and not kept; nor
        is one that was deleted while it was read."""
        waiting = self._waiting.pop(block.hash, [])
        wanted = payload is not None and self._store.find(block.hash) is not None
        held = payload is not None and wanted and self._pool.put(block, payload)
        if held and not waiting:
            self._ahead.add(block.hash)
        for landed in waiting:
            landed(self._pool.hold(block.hash) if held else payload, held)

    @property
    def is_quiet(self) -> bool:
        return not self._waiting

    def clear(self) -> None:
        self._waiting.clear()
        self._ahead.clear()
