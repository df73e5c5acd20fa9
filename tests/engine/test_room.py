"""Making room takes from the pool what is needed, and nothing else."""

import numpy as np
import pytest

from agent_memory.block import chain, in_blocks
from agent_memory.engine.ledger import Ledger
from agent_memory.engine.room import Cost, Room
from agent_memory.engine.scheduler import Scheduler
from agent_memory.engine.sequence import Sequence, State
from agent_memory.kvcache.block_pool import BlockPool
from tests.engine.test_scheduler import BACKGROUND, SPEC, of_agent, run, sequence

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


def test_in_a_closed_room_nobody_new_begins_and_who_was_sent_back_goes_on() -> None:
    """Also at the end of the server, which nobody new sees, and no load that would open it."""
    scheduler = Scheduler(256, 8)
    room = Room(
        Ledger(1000 * KB, {}),
        Cost(token_bytes=100, sequence_bytes=0, context_bytes=0),
        *(scheduler, BlockPool(1000 * KB)),
        needs=lambda seq: len(seq.tokens),
        runs=lambda: 0,
        preempt=lambda _seq: None,
    )
    seq = sequence(10)
    scheduler.add(seq)
    room.closed = True
    assert scheduler.admit(lambda _: 0, room.admits) is None
    seq.started = True
    assert scheduler.admit(lambda _: 0, room.admits) is seq


@pytest.mark.parametrize("remembered", [0, 65, 256, 257, 511, 1000])
def test_who_fits_alone_begins_whatever_of_it_is_remembered(remembered: int) -> None:
    """Else it would wait for ever, and everybody behind it."""
    cost = Cost(token_bytes=100, sequence_bytes=1000, context_bytes=2)
    scheduler = Scheduler(256, 8)
    room = Room(
        Ledger(1000 + 102 * (2000 + 256), {}),
        cost,
        scheduler,
        BlockPool(1 << 20),
        needs=lambda seq: in_blocks(seq.reserve - remembered) + remembered,
        runs=lambda: 0,
        preempt=lambda _seq: None,
    )
    assert cost.most_tokens(room.ledger.spare_bytes) == 2000
    scheduler.add(seq := sequence(1900, max_new=100))
    assert scheduler.admit(lambda _: 0, room.admits) is seq


def test_one_that_ends_while_others_make_room_for_it_needs_none() -> None:
    """And what these have left in the pool, until it is written, may be as much as they gave."""
    scheduler, pool = Scheduler(256, 8), BlockPool(1 << 20)

    def preempt(yielding: Sequence) -> None:
        """The step under way is settled for it: that was the last of the growing one."""
        for seq in (yielding, growing):
            room.release(seq)
        growing.move(State.FINISHED)
        growing.kv = None
        yielding.rewind()
        scheduler.readmit(yielding)
        assert pool.put(block, np.zeros(80_000, np.uint8))
        pool.hold(block.hash)

    room = Room(
        Ledger(200_000, {}),
        Cost(token_bytes=100, sequence_bytes=0, context_bytes=0),
        *(scheduler, pool),
        needs=lambda seq: len(seq.tokens),
        runs=lambda: 0,
        preempt=preempt,
    )
    [block] = chain(SPEC.fingerprint, range(10))
    growing, yielding = of_agent("a", 256), of_agent("b", 256, BACKGROUND)
    for seq in (growing, yielding):
        scheduler.add(seq)
        assert scheduler.admit(lambda _: 0, lambda _: True) is seq
        run(seq)
    assert growing.kv is not None
    growing.kv.grow_to(256)
    growing.kv.length = 256
    growing.in_flight = 1
    for holder, nbytes in ((growing, 25_600), (yielding, 25_600), ("others", 145_000)):
        room.ledger.hold(holder, nbytes)
    assert growing in room.short()
    assert not room.grow(growing)


def test_who_found_no_room_finds_it_as_soon_as_somebody_yields() -> None:
    """Background work cannot be sent back while it is restored, and can when it runs."""
    scheduler = Scheduler(256, 8)

    def preempt(seq: Sequence) -> None:
        seq.rewind()
        scheduler.readmit(seq)
        room.release(seq)

    room = Room(
        Ledger(100_000, {}),
        Cost(token_bytes=100, sequence_bytes=0, context_bytes=0),
        *(scheduler, BlockPool(1 << 20)),
        needs=lambda seq: in_blocks(seq.reserve),
        runs=lambda: 0,
        preempt=preempt,
    )
    night, day = of_agent("night", 300, BACKGROUND), of_agent("day", 300)
    scheduler.add(night)
    assert scheduler.admit(lambda _: 0, room.admits) is night
    room.hold(night, 512)
    night.move(State.RESTORING)
    scheduler.add(day)
    assert scheduler.admit(lambda _: 0, room.admits) is None
    night.move(State.RUNNING)
    assert scheduler.admit(lambda _: 0, room.admits) is day
    assert night.state is State.WAITING
