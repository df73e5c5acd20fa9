"""A store of 20,000 blocks: how long a start takes, and an eviction."""

import sys
import time

import pytest

from agent_memory.block import BLOCK_TOKENS, Block, chain
from agent_memory.kv_spec import KVSpec
from agent_memory.store import index as rows
from agent_memory.store.agents import Agents
from agent_memory.store.format import BlockFile
from agent_memory.store.index import Index
from agent_memory.store.limits import Limits
from tests.store.conftest import Opener

NUM_AGENTS = 200
BLOCKS_EACH = 100
START_S = 2.0


def fill(opener: Opener, spec: KVSpec) -> list[list[Block]]:
    """Files of one byte and the rows that say so: no start reads more of a file than its size."""
    opener.open()
    opener.close()
    agents, talks, changes = Agents(), list[list[Block]](), list[rows.Statement]()
    for n in range(NUM_AGENTS):
        blocks = chain(spec.fingerprint, [n] * BLOCKS_EACH * BLOCK_TOKENS)
        talks.append(blocks)
        for used, block in enumerate(blocks):
            opener.file(block).write_bytes(b"\0")
            file = BlockFile(block, spec.fingerprint, 1, bytes(16))
            changes.append(rows.put_block(file, n * BLOCKS_EACH + used))
        changes += rows.put_agent(agents.record(str(n), spec.fingerprint, tuple(blocks), 0.0).agent)
    index = Index.open(opener.path / "index.db")
    index.commit(changes)
    index.close()
    return talks


@pytest.mark.slow
def test_a_start_and_evictions_with_twenty_thousand_blocks(opener: Opener, spec: KVSpec) -> None:
    talks = fill(opener, spec)
    began, wall = time.process_time(), time.monotonic()
    store = opener.open()
    start_s, wall_s = time.process_time() - began, time.monotonic() - wall
    assert store.disk_bytes == NUM_AGENTS * BLOCKS_EACH
    assert start_s < START_S

    opener.limits = Limits(disk_bytes=NUM_AGENTS * BLOCKS_EACH // 2, min_free_bytes=0)
    began = time.process_time()
    store = opener.open()
    assert store.flush(30)
    evict_s = time.process_time() - began - start_s
    num_evicted = opener.metric("evicted_blocks_total", reason="disk_bytes")
    assert num_evicted >= NUM_AGENTS * BLOCKS_EACH // 2
    assert evict_s / num_evicted < 1e-3
    store.check()
    assert not any(store.find(block.hash) for block in talks[0])
    assert all(store.find(block.hash) for block in talks[-1])
    assert len(store.agents.all()) < NUM_AGENTS
    figures = f"{start_s:.2f} s of CPU, {wall_s:.2f} s, {evict_s / num_evicted * 1e6:.0f} µs"
    sys.stdout.write(f"start and eviction: {figures}\n")
