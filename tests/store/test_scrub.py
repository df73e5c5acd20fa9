"""Files read again while idle: in which order, when, and what becomes of bad ones."""

import time

import pytest

from agent_memory.block import Block, Loss, chain
from agent_memory.kv_spec import KVSpec
from agent_memory.store.limits import Limits
from agent_memory.store.scrub import Scrubbed
from tests.store.conftest import Opener


@pytest.fixture
def blocks(opener: Opener, spec: KVSpec) -> list[Block]:
    """On disk, one after the other."""
    opener.open()
    blocks = chain(spec.fingerprint, range(600))
    for block in blocks:
        opener.put(block)
    return blocks


def spoil(opener: Opener, block: Block) -> None:
    path = opener.file(block)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def test_good_files_stay(opener: Opener, blocks: list[Block]) -> None:
    assert opener.store.scrub(99) == Scrubbed(3, 0)
    assert opener.metric("scrubbed_total") == 3
    assert all(opener.read(block) for block in blocks)
    opener.store.check()


def test_a_bad_file_goes_to_quarantine(opener: Opener, blocks: list[Block]) -> None:
    spoil(opener, blocks[1])
    opener.file(blocks[2]).unlink()
    assert opener.store.scrub(99) == Scrubbed(3, 2)
    assert opener.store.flush(5)
    assert opener.metric("restore_rejected_total", reason="checksum") == 1
    assert opener.metric("restore_rejected_total", reason="missing") == 1
    assert opener.quarantined() == [blocks[1].hash.hex()]
    gone = opener.store.gone
    assert [gone.why(block.hash) for block in blocks] == [None, Loss.DAMAGED, Loss.MISSING]
    opener.store.check()
    assert opener.put(*blocks) == [True] * 3
    assert all(opener.read(block) for block in blocks)


def test_another_blocks_file_is_no_good(opener: Opener, blocks: list[Block], spec: KVSpec) -> None:
    other = chain(spec.fingerprint, range(1, 257))[0]
    opener.put(other)
    opener.file(blocks[0]).write_bytes(opener.file(other).read_bytes())
    assert opener.store.scrub(99) == Scrubbed(4, 1)
    assert opener.metric("restore_rejected_total", reason="tokens") == 1


def test_what_was_read_longest_ago_comes_first_also_after_a_restart(
    opener: Opener, blocks: list[Block]
) -> None:
    assert opener.read(blocks[0])
    opener.open()
    for bad in (blocks[1], blocks[2], blocks[0]):
        spoil(opener, bad)
        assert opener.store.scrub(1) == Scrubbed(1, 1)
        assert opener.store.find(bad.hash) is None
    assert opener.store.scrub(1) == Scrubbed(0, 0)


@pytest.mark.slow
def test_while_idle_only_what_was_not_read_for_a_week_is(
    opener: Opener, blocks: list[Block]
) -> None:
    opener.limits = Limits(1 << 40, 0, None, None, lambda: today, lambda path: 1 << 60)
    today, busy = 1000, True
    opener.open()
    for _ in range(8):
        today += 1
        opener.open()
    opener.store.scrub_while(lambda: not busy)
    time.sleep(1.2)
    assert opener.metric("scrubbed_total") <= 1  # none but one that was begun before
    busy = False
    deadline = time.monotonic() + 10
    while opener.metric("scrubbed_total") < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.2)
    assert opener.metric("scrubbed_total") == 3
