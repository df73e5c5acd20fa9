"""Blocks on their way: read once, however many wait, and whether anybody does."""

from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest

from agent_memory.block import chain
from agent_memory.engine.reads import Reads
from agent_memory.kv_spec import KVSpec
from agent_memory.kvcache.block_pool import BlockPool
from agent_memory.metrics import Metrics
from agent_memory.store.block_store import BlockStore
from agent_memory.store.state_dir import StateDir
from tests.kvcache.kv import small_spec

READ_S = 10


@pytest.fixture
def spec() -> KVSpec:
    return small_spec(8)


def test_a_block_is_read_once_by_who_is_ahead_and_who_waits(tmp_path: Path, spec: KVSpec) -> None:
    state, pool = StateDir.open(tmp_path), BlockPool(64 << 20)
    store = BlockStore.open(state, Metrics())
    blocks = chain(spec.fingerprint, range(600))
    for block in blocks:
        payload = np.full(spec.payload_bytes(block.num_tokens), block.num_tokens % 251, np.uint8)
        store.put(block, payload, spec, lambda _hash, _ok: None)
    assert store.flush(READ_S)

    posted: SimpleQueue[Callable[[], object]] = SimpleQueue()
    reads, landed = Reads(spec, pool, store, posted.put), list[bool]()
    reads.ahead(blocks, 64 << 20)
    for block in blocks:
        for _ in range(2):
            reads.want(block, lambda _payload, held: landed.append(held))
    for _ in blocks:
        posted.get(timeout=READ_S)()
    assert landed == [True] * 6
    assert posted.empty()
    for block in blocks:
        assert not reads.from_disk(block.hash)  # who waited knows where it came from

    store.close(READ_S)
    state.close()
    assert posted.empty()


def test_the_first_use_of_what_was_read_ahead_is_from_disk(tmp_path: Path, spec: KVSpec) -> None:
    state, pool = StateDir.open(tmp_path), BlockPool(64 << 20)
    store = BlockStore.open(state, Metrics())
    [block] = chain(spec.fingerprint, range(100))
    payload = np.zeros(spec.payload_bytes(100), np.uint8)
    store.put(block, payload, spec, lambda _hash, _ok: None)
    assert store.flush(READ_S)
    posted: SimpleQueue[Callable[[], object]] = SimpleQueue()
    reads = Reads(spec, pool, store, posted.put)
    reads.ahead([block], 64 << 20)
    posted.get(timeout=READ_S)()
    assert block.hash in pool
    assert reads.from_disk(block.hash) and not reads.from_disk(block.hash)
    store.close(READ_S)
    state.close()
