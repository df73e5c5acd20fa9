"""Blocks: equal names exactly where everything up to and in the block is equal."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_memory.block import (
    BLOCK_TOKENS,
    HASH_BYTES,
    Block,
    BlockHash,
    chain,
    common_tokens,
    token_bytes,
)

ROOT = BlockHash(bytes(HASH_BYTES))
OTHER_ROOT = BlockHash(b"\1" * HASH_BYTES)

# Few different ids, so that texts share beginnings.
ids = st.lists(st.integers(0, 2), max_size=12)
any_ids = st.lists(st.integers(0, 2**31 - 1), max_size=20)


@given(any_ids)
def test_tokens_survive_their_bytes(tokens: list[int]) -> None:
    data = token_bytes(tokens)
    assert data == struct.pack(f"<{len(tokens)}i", *tokens)
    if tokens:
        block = Block.of(ROOT, data)
        assert block.token_ids() == tokens and block.num_tokens == len(tokens)


@given(ids, ids)
def test_common_tokens_are_the_shared_beginning(a: list[int], b: list[int]) -> None:
    shared = 0
    while shared < min(len(a), len(b)) and a[shared] == b[shared]:
        shared += 1
    assert common_tokens(token_bytes(a), token_bytes(b)) == shared


@pytest.mark.parametrize("num_tokens", [0, 1, 255, 256, 257, 512, 600])
def test_a_chain_holds_its_tokens_in_full_blocks_but_for_the_last(num_tokens: int) -> None:
    tokens = [(7 * i) % 1000 for i in range(num_tokens)]
    blocks = chain(ROOT, tokens)
    assert [t for block in blocks for t in block.token_ids()] == tokens
    assert all(block.full for block in blocks[:-1])
    parents = [ROOT, *(block.hash for block in blocks)]
    assert [block.parent for block in blocks] == parents[:-1]
    assert len(blocks) == -(-num_tokens // BLOCK_TOKENS)


def test_the_hash_covers_parent_and_tokens() -> None:
    tokens = token_bytes([1, 2, 3])
    hashes = {
        Block.of(ROOT, tokens).hash,
        Block.of(OTHER_ROOT, tokens).hash,
        Block.of(ROOT, token_bytes([1, 2, 4])).hash,
        Block.of(ROOT, token_bytes([1, 2])).hash,
        Block.of(ROOT, token_bytes([1, 2, 3, 0])).hash,
    }
    assert len(hashes) == 5
    assert Block.of(ROOT, tokens) == Block.of(ROOT, tokens)


def test_a_change_in_the_beginning_renames_everything_after_it() -> None:
    tokens = list(range(600))
    changed = [*tokens[:3], 0, *tokens[4:]]
    ours, theirs = chain(ROOT, tokens), chain(ROOT, changed)
    assert not {block.hash for block in ours} & {block.hash for block in theirs}
    assert ours[1].tokens == theirs[1].tokens


@pytest.mark.parametrize("data", [b"", b"abc", bytes(4 * BLOCK_TOKENS + 4)])
def test_a_block_is_of_whole_tokens_and_at_most_full(data: bytes) -> None:
    with pytest.raises(AssertionError):
        Block.of(ROOT, data)


def test_a_checkpoint_is_named_apart_from_the_block_of_its_tokens() -> None:
    tokens = token_bytes([1, 2, 3])
    point = Block.checkpoint_after(ROOT, tokens)
    assert point.is_checkpoint and not Block.of(ROOT, tokens).is_checkpoint
    assert point.hash != Block.of(ROOT, tokens).hash
    assert point.hash != Block.checkpoint_after(ROOT, b"").hash
    with pytest.raises(AssertionError):
        Block.checkpoint_after(ROOT, bytes(4 * BLOCK_TOKENS))


def test_token_ids_that_do_not_fit_are_refused() -> None:
    with pytest.raises(OverflowError):
        token_bytes([2**31])
