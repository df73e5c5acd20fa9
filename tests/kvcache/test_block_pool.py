"""The block pool by a random walk beside a model of it that is slow and plain."""

from itertools import takewhile

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agent_memory.block import Block, BlockHash, token_bytes
from agent_memory.kvcache.block_pool import BlockPool

ROOT = BlockHash(bytes(32))
BUDGET = 100


def tree(parent: BlockHash, depth: int) -> dict[Block, tuple[Block, ...]]:
    """Blocks with their chains from the root: two children each."""
    chains: dict[Block, tuple[Block, ...]] = {}
    for token in (1, 2):
        block = Block.of(parent, token_bytes([depth, token]))
        below = tree(block.hash, depth - 1) if depth else {}
        chains[block] = (block,)
        chains |= {b: (block, *chain) for b, chain in below.items()}
    return chains


CHAINS = tree(ROOT, 3)
BLOCKS = list(CHAINS)
blocks = st.sampled_from(BLOCKS)
PAYLOADS = {b: np.full(5 + 7 * (i % 5), i, np.uint8) for i, b in enumerate(BLOCKS)}


class PoolWalk(RuleBasedStateMachine):
    """The model: how often each present block is held, when each was last used, and which were
    dropped while they were held."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BUDGET)
        self.held: dict[Block, int] = {}
        self.used: dict[Block, int] = {}
        self.doomed: set[Block] = set()
        self.now = 0

    def use(self, chain: tuple[Block, ...]) -> None:
        for block in reversed(chain):
            if block in self.held:
                self.now += 1
                self.used[block] = self.now

    def needed(self, block: Block) -> bool:
        """Held, or the beginning of a chain that is held further on, without a gap."""
        return self.held[block] > 0 or any(
            self.needed(child) for child in self.held if child.parent == block.hash
        )

    def forget(self, block: Block) -> None:
        del self.held[block], self.used[block]

    @rule(block=blocks)
    def put(self, block: Block) -> None:
        present = block in self.held
        before = dict(self.held)
        size = PAYLOADS[block].nbytes
        idle = sum(PAYLOADS[b].nbytes for b in before if not self.needed(b))
        held = sum(PAYLOADS[b].nbytes for b in before) - idle
        put = self.pool.put(block, PAYLOADS[block])
        assert put == (present or held + size <= BUDGET)
        gone = [b for b in before if b.hash not in self.pool]
        assert put or not gone
        self.doomed.discard(block)
        self.evicted(gone, size)
        if put and not present:
            self.held[block] = 0
            self.use((block,))
            above = takewhile(lambda b: b in self.held, reversed(CHAINS[block][:-1]))
            self.use(tuple(above)[::-1])

    def evicted(self, gone: list[Block], size: int) -> None:
        """Only idle leaves, one after another, the longest unused first, and not one too many."""
        for block in sorted(gone, key=lambda b: self.used[b]):
            assert sum(PAYLOADS[b].nbytes for b in self.held) + size > BUDGET
            leaves = [
                b
                for b in self.held
                if not self.held[b] and not any(c.parent == b.hash for c in self.held)
            ]
            assert block == min(leaves, key=lambda b: self.used[b])
            self.forget(block)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.held, key=BLOCKS.index)))
        assert self.pool.hold(block.hash) is PAYLOADS[block]
        self.held[block] += 1

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        held = [b for b in BLOCKS if self.held.get(b)]
        block = data.draw(st.sampled_from(held))
        self.pool.release(block.hash)
        self.held[block] -= 1
        if block in self.doomed and not self.held[block]:
            self.doomed.remove(block)
            self.forget(block)

    @rule(block=blocks)
    def use_chain(self, block: Block) -> None:
        self.pool.use(CHAINS[block])
        self.use(CHAINS[block])

    @rule(block=blocks)
    def drop(self, block: Block) -> None:
        self.pool.drop(block.hash)
        if self.held.get(block) == 0:
            self.forget(block)
        elif block in self.held:
            self.doomed.add(block)

    @rule()
    def clear(self) -> None:
        assert self.pool.clear() == sum(n > 0 for n in self.held.values())
        self.held, self.used, self.doomed = {}, {}, set()

    @invariant()
    def same(self) -> None:
        self.pool.check()
        assert len(self.pool) == len(self.held)
        for block in BLOCKS:
            there = block in self.held
            assert (block.hash in self.pool) == there
            known = there and block not in self.doomed
            assert self.pool.find(block.hash) == (block if known else None)
            below = {b for b in self.held if b.parent == block.hash and b not in self.doomed}
            assert set(self.pool.children(block.hash)) == below
        assert self.pool.num_bytes == sum(PAYLOADS[b].nbytes for b in self.held) <= BUDGET
        idle = sum(PAYLOADS[b].nbytes for b in self.held if not self.needed(b))
        could_go = self.pool._victims(self.pool.num_bytes)
        assert self.pool.idle_bytes == idle == sum(slot.payload.nbytes for slot in could_go)


TestPoolWalk = pytest.mark.requirement("B-21")(PoolWalk.TestCase)
TestPoolWalk.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_what_is_larger_than_the_budget_is_refused_and_nothing_goes_for_it() -> None:
    pool = BlockPool(BUDGET)
    assert pool.put(BLOCKS[0], PAYLOADS[BLOCKS[0]])
    assert not pool.put(BLOCKS[1], np.zeros(BUDGET + 1, np.uint8))
    assert BLOCKS[0].hash in pool


def test_a_chain_goes_from_its_end() -> None:
    pool = BlockPool(BUDGET)
    chain = CHAINS[BLOCKS[3]]
    payload = np.zeros(BUDGET // len(chain), np.uint8)
    for block in chain:
        assert pool.put(block, payload)
    others = [b for b in BLOCKS if b.parent == ROOT and b != chain[0]]
    assert pool.put(others[0], payload)
    assert [b.hash in pool for b in chain] == [True] * (len(chain) - 1) + [False]
