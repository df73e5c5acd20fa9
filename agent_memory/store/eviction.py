"""Which blocks go when there is no room, or when nobody has used them for long.

Knows the order: anonymous before owned before pinned, and of each what was used longest ago, but
never a block before those that follow it.  Knows nothing of files or rows.  Writer thread.

The order is a heap of (rank, used, hash) of blocks that nothing follows.  Keys are not kept up to
date: one is compared with how things are when it comes to the top, and put back if they changed.
That is right because keys only grow, but for demotions, after which the heap is made anew.
"""

from heapq import heapify, heappop, heappush

from agent_memory.block import BlockHash, Loss
from agent_memory.store.agents import Agents, Rank
from agent_memory.store.catalog import Catalog
from agent_memory.store.format import BlockFile

_Key = tuple[int, int, BlockHash]


class Eviction:
    def __init__(self, catalog: Catalog, agents: Agents) -> None:
        self._catalog = catalog
        self._agents = agents
        self._heap: list[_Key] = []
        self._num_demotions = -1
        self._cut: set[str] = set()

    def make_room(self, num_bytes: int) -> list[BlockFile]:
        """Forget blocks of so many bytes, or all there are.  -> those"""
        gone: list[BlockFile] = []
        while num_bytes > 0 and (best := self._pop()):
            block_hash, used = best
            if file := self._catalog.evict(block_hash, used):
                went = self._went(file, Loss.EVICTED)
                num_bytes -= sum(file.file_bytes for file in went)
                gone += went
        return gone

    def expire(self, clock: int) -> list[BlockFile]:
        """Forget what was last used at `clock` or before, pinned agents' blocks excepted."""
        gone: list[BlockFile] = []
        old = dict(self._catalog.used_until(clock))
        leaves = list(old)
        while leaves:
            block_hash = leaves.pop()
            if block_hash not in old or self._agents.rank(block_hash) is Rank.PINNED:
                continue
            if file := self._catalog.evict(block_hash, old[block_hash]):
                gone += self._went(file, Loss.EXPIRED)
                leaves.append(file.block.parent)
        return gone

    def take_cut(self) -> set[str]:
        """Agents whose heads have become shorter since the last call."""
        cut, self._cut = self._cut, set()
        return cut

    def _went(self, file: BlockFile, loss: Loss) -> list[BlockFile]:
        """-> it, and the checkpoints that are of no use to anybody without it"""
        self._catalog.gone.note(file.block, loss)
        cut = self._agents.cut(file.block)
        self._cut |= cut.agents
        useless = (self._forget(checkpoint.hash) for [checkpoint] in cut.loose)
        return [file, *(other for other in useless if other)]

    def _forget(self, block_hash: BlockHash) -> BlockFile | None:
        used = self._catalog.used_as_leaf(block_hash)
        return None if used is None else self._catalog.evict(block_hash, used)

    def _pop(self) -> tuple[BlockHash, int] | None:
        self._refresh()
        while self._heap:
            key = heappop(self._heap)
            now = self._key(key[2])
            if now == key:
                return key[2], key[1]
            if now is not None:
                heappush(self._heap, now)
        return None

    def _refresh(self) -> None:
        fresh = self._catalog.take_new_leaves()
        demotions = self._agents.num_demotions
        if demotions != self._num_demotions or len(self._heap) > 2 * len(self._catalog) + 1000:
            self._num_demotions = demotions
            keys = (self._key(block_hash) for block_hash in self._catalog.leaves())
            self._heap = [key for key in keys if key]
            heapify(self._heap)
            return
        for block_hash in fresh:
            if key := self._key(block_hash):
                heappush(self._heap, key)

    def _key(self, block_hash: BlockHash) -> _Key | None:
        """None if it cannot go now."""
        used = self._catalog.used_as_leaf(block_hash)
        return None if used is None else (self._agents.rank(block_hash), used, block_hash)
