"""Making room takes from the pool what is needed, and nothing else."""

import numpy as np

from agent_memory.block import chain
from agent_memory.engine.ledger import Ledger
from agent_memory.engine.room import Cost, Room
from agent_memory.engine.scheduler import Scheduler
from agent_memory.kvcache.block_pool import BlockPool
from tests.engine.test_scheduler import SPEC, sequence

KB = 1 << 10


def test_who_is_admitted_leaves_the_pool_what_nobody_needs() -> None:
    """What is put between being admitted and beginning must not push out what could stay."""
    scheduler, pool = Scheduler(256, 8), BlockPool(1000 * KB)
    room = Room(
        Ledger(10_000 * KB, {}),
        Cost(token_bytes=100, sequence_bytes=0, context_bytes=0),
        scheduler,
        pool,
        needs=lambda seq: len(seq.tokens),
        runs=lambda: 0,
        preempt=lambda _seq: None,
    )
    first, second = chain(SPEC.fingerprint, range(512))
    assert pool.put(first, np.zeros(100 * KB, np.uint8))
    seq = sequence(10)
    scheduler.add(seq)
    assert scheduler.admit(lambda _: 0, room.admits) is seq
    assert pool.put(second, np.zeros(100 * KB, np.uint8))
    assert first.hash in pool and pool.num_bytes == 200 * KB
