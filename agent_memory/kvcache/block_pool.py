"""The memory tier: payloads of blocks as host bytes, within a fixed budget.

Knows which blocks are here, who holds them and which may go.  Knows nothing of MLX, files or
sequences.  Engine thread only; `num_bytes` and `find` may be read from any thread.

    held      ref_count > 0: being copied into a run, or waiting to be written.  Never evicted.
    idle      ref_count = 0: evicted when room is needed, least recently used first, and never
              before its children: a chain without its beginning is of no use to anyone.
    doomed    dropped while it was held: no longer found, gone with its last hold unless put again.

The limit is the budget, or less while others need the memory.  It may be set below what is held:
then nothing is put until that is gone.

Invariants: num_bytes is the sum of the payloads and at most the budget; `children` mirrors the
blocks' parents exactly; a block was used no later than what it builds on.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from agent_memory.block import Block, BlockHash


@dataclass(slots=True)
class Slot:
    block: Block
    payload: np.ndarray
    ref_count: int = 0
    doomed: bool = False


class BlockPool:
    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.limit_bytes = budget_bytes
        self.num_bytes = 0
        self._slots: OrderedDict[BlockHash, Slot] = OrderedDict()  # least recently used first
        self._children: dict[BlockHash, set[BlockHash]] = {}
        self._held: set[BlockHash] = set()

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, block_hash: object) -> bool:
        return block_hash in self._slots

    def find(self, block_hash: BlockHash) -> Block | None:
        slot = self._slots.get(block_hash)
        return slot.block if slot and not slot.doomed else None

    def children(self, parent: BlockHash) -> list[Block]:
        slots = (self._slots[block_hash] for block_hash in self._children.get(parent, ()))
        return [slot.block for slot in slots if not slot.doomed]

    def put(self, block: Block, payload: np.ndarray) -> bool:
        """False when idle blocks cannot make enough room; then nothing was evicted in vain."""
        if slot := self._slots.get(block.hash):
            slot.doomed = False
            return True
        if not self.make_room(payload.nbytes):
            return False
        self._slots[block.hash] = Slot(block, payload)
        self._children.setdefault(block.parent, set()).add(block.hash)
        self.num_bytes += payload.nbytes
        self._use_ancestors(block)
        return True

    def use(self, chain: Iterable[Block]) -> None:
        """Mark as just used, parents last, so that leaves go before what they build on."""
        for block in reversed(list(chain)):
            if block.hash in self._slots:
                self._slots.move_to_end(block.hash)

    def _use_ancestors(self, block: Block) -> None:
        parent = self._slots.get(block.parent)
        while parent:
            self._slots.move_to_end(parent.block.hash)
            parent = self._slots.get(parent.block.parent)

    def hold(self, block_hash: BlockHash) -> np.ndarray:
        slot = self._slots[block_hash]
        slot.ref_count += 1
        self._held.add(block_hash)
        return slot.payload

    def release(self, block_hash: BlockHash) -> None:
        slot = self._slots[block_hash]
        assert slot.ref_count > 0
        slot.ref_count -= 1
        if slot.ref_count == 0:
            self._held.remove(block_hash)
            if slot.doomed:
                self._remove(slot)

    def drop(self, block_hash: BlockHash) -> None:
        """Forget a block: at once if it is idle, else as soon as nobody holds it."""
        slot = self._slots.get(block_hash)
        if slot and slot.ref_count:
            slot.doomed = True
        elif slot:
            self._remove(slot)

    def clear(self) -> int:
        """Forget every block, at the end of the process; returns how many were still held."""
        held = len(self._held)
        self._held.clear()
        self._slots.clear()
        self._children.clear()
        self.num_bytes = 0
        return held

    def make_room(self, nbytes: int) -> bool:
        """Whether so much can be put now.  False: nothing was evicted."""
        over = self.num_bytes + nbytes - self.limit_bytes
        victims = self._victims(over)
        if sum(slot.payload.nbytes for slot in victims) < over:
            return False
        for slot in victims:
            self._remove(slot)
        return True

    def resize(self, limit_bytes: int) -> None:
        """Set the limit, but never above the budget, and evict what is idle until it is kept."""
        self.limit_bytes = max(0, min(limit_bytes, self.budget_bytes))
        for slot in self._victims(self.num_bytes - self.limit_bytes):
            self._remove(slot)

    @property
    def idle_bytes(self) -> int:
        """How much could be evicted now: all but what is held, and what that builds on."""
        stays: dict[BlockHash, int] = {}
        for block_hash in self._held:
            slot = self._slots.get(block_hash)
            while slot and slot.block.hash not in stays:
                stays[slot.block.hash] = slot.payload.nbytes
                slot = self._slots.get(slot.block.parent)
        return self.num_bytes - sum(stays.values())

    def _victims(self, nbytes: int) -> list[Slot]:
        """Who goes to free so many bytes, children first; all that may go if that is too few."""
        victims: dict[BlockHash, Slot] = {}
        for slot in self._slots.values() if nbytes > 0 else ():
            if slot.ref_count == 0 and self._children_of(slot) <= victims.keys():
                victims[slot.block.hash] = slot
                nbytes -= slot.payload.nbytes
                if nbytes <= 0:
                    break
        return list(victims.values())

    def _children_of(self, slot: Slot) -> set[BlockHash]:
        return self._children.get(slot.block.hash, set())

    def _remove(self, slot: Slot) -> None:
        del self._slots[slot.block.hash]
        siblings = self._children[slot.block.parent]
        siblings.discard(slot.block.hash)
        if not siblings:
            del self._children[slot.block.parent]
        self.num_bytes -= slot.payload.nbytes

    def check(self) -> None:
        assert self.num_bytes == sum(s.payload.nbytes for s in self._slots.values())
        assert self.num_bytes <= self.budget_bytes and 0 <= self.limit_bytes <= self.budget_bytes
        for block_hash, slot in self._slots.items():
            assert slot.block.hash == block_hash and slot.ref_count >= slot.doomed
            assert block_hash in self._children[slot.block.parent]
        assert sum(map(len, self._children.values())) == len(self._slots)
        assert self._held == {h for h, slot in self._slots.items() if slot.ref_count}
