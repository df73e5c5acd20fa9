"""Which blocks were lost, and why."""

import random
from collections.abc import Callable

import pytest

from agent_memory.block import (
    BLOCK_TOKENS,
    HASH_BYTES,
    Block,
    BlockHash,
    Loss,
    chain,
    token_bytes,
)
from agent_memory.store.agents import MAX_HEADS
from agent_memory.store.gone import Gone
from tests.store.conftest import Opener

ROOT = BlockHash(b"r" * HASH_BYTES)


def block(first: int, count: int = BLOCK_TOKENS, parent: BlockHash = ROOT) -> Block:
    return Block.of(parent, token_bytes(range(first, first + count)))


def test_a_loss_is_known_by_name_and_the_latest_counts() -> None:
    gone, lost = Gone(), block(0)
    assert gone.why(lost.hash) is None
    gone.note(lost, Loss.EVICTED)
    gone.note(lost, Loss.DAMAGED)
    assert gone.why(lost.hash) is Loss.DAMAGED
    gone.check()


def test_a_prompt_may_begin_with_a_partial_block_that_is_gone() -> None:
    gone, tokens = Gone(), token_bytes(range(100))
    gone.note(block(0, 10), Loss.EVICTED)
    gone.note(block(0, 30), Loss.EXPIRED)
    gone.note(block(0, 150), Loss.DAMAGED)  # goes on after the prompt
    gone.note(block(1, 40), Loss.DAMAGED)  # begins otherwise
    assert gone.beginning(ROOT, tokens) == (30, Loss.EXPIRED)
    assert gone.beginning(ROOT, token_bytes(range(29))) == (10, Loss.EVICTED)
    assert gone.beginning(ROOT, token_bytes(range(9))) is None
    assert gone.beginning(block(0).hash, tokens) is None


def test_only_the_latest_are_kept() -> None:
    gone, rng = Gone(most=50), random.Random(1)
    blocks = [block(n, rng.choice((5, BLOCK_TOKENS))) for n in range(200)]
    for lost in blocks:
        gone.note(lost, Loss.EVICTED)
        gone.check()
    assert [gone.why(lost.hash) for lost in blocks] == [None] * 150 + [Loss.EVICTED] * 50


def cut(opener: Opener, lost: Block) -> None:
    opener.file(lost).write_bytes(opener.file(lost).read_bytes()[:-1])


def swap(opener: Opener, lost: Block) -> None:
    raw = bytearray(opener.file(lost).read_bytes())
    raw[-1] ^= 1
    opener.file(lost).write_bytes(raw)


def remove(opener: Opener, lost: Block) -> None:
    opener.file(lost).unlink()


@pytest.mark.parametrize(
    ("harm", "loss"), [(cut, Loss.DAMAGED), (swap, Loss.DAMAGED), (remove, Loss.MISSING)]
)
def test_what_is_found_bad_when_it_is_read(
    opener: Opener, harm: Callable[[Opener, Block], None], loss: Loss
) -> None:
    store, good, bad = opener.open(), block(0), block(1)
    opener.put(good, bad)
    harm(opener, bad)
    assert opener.read(good) and not opener.read(bad)
    assert (store.gone.why(good.hash), store.gone.why(bad.hash)) == (None, loss)


@pytest.mark.parametrize(("harm", "loss"), [(cut, Loss.DAMAGED), (remove, Loss.MISSING)])
def test_what_is_found_bad_at_the_start(
    opener: Opener, harm: Callable[[Opener, Block], None], loss: Loss
) -> None:
    opener.open()
    opener.put(block(0), block(1))
    opener.close()
    harm(opener, block(1))
    store = opener.open()
    assert (store.gone.why(block(0).hash), store.gone.why(block(1).hash)) == (None, loss)


def test_conversations_that_newer_ones_push_out_are_lost_but_not_those_that_grow(
    opener: Opener,
) -> None:
    store = opener.open()
    heads = [chain(ROOT, range(1000 * n, 1000 * n + 300)) for n in range(MAX_HEADS + 1)]
    grown = chain(ROOT, range(310))
    for head in (heads[0], grown, *heads[1:]):
        opener.put(*[block for block in head if store.find(block.hash) is None])
        store.record("ann", ROOT, head)
    assert store.gone.why(heads[0][-1].hash) is None
    assert [store.gone.why(block.hash) for block in grown] == [Loss.EVICTED] * 2
    assert not any(store.gone.why(block.hash) for head in heads[1:] for block in head)
