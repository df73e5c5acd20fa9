"""The three states of a block, and a walk against a plain model."""

import random

import pytest

from agent_memory.block import Block, BlockHash, chain
from agent_memory.store.catalog import Catalog, Ticket
from agent_memory.store.format import BlockFile

ROOT = BlockHash(bytes(32))
BLOCKS = chain(ROOT, range(900))


def file_of(block: Block, file_bytes: int = 1000) -> BlockFile:
    return BlockFile(block, ROOT, file_bytes, bytes(16))


@pytest.mark.parametrize(
    ("events", "present", "pending"),
    [
        ("expect", False, True),
        ("expect written", True, False),
        ("expect failed", False, False),
        ("expect forget", False, False),
        ("expect forget written", False, False),
        ("expect expect written", True, False),
        ("expect forget expect written", False, True),
        ("expect written forget", False, False),
        ("expect written forget expect", False, True),
    ],
)
def test_transitions(events: str, present: bool, pending: bool) -> None:
    """`written` and `failed` settle the first expectation."""
    catalog, tickets, block = Catalog(), list[Ticket](), BLOCKS[0]
    for event in events.split():
        match event:
            case "expect":
                tickets.append(catalog.expect(block, 900))
            case "written":
                catalog.settle(tickets.pop(0), file_of(block))
            case "failed":
                catalog.settle(tickets.pop(0), None)
            case "forget":
                catalog.forget(block.hash)
        catalog.check()
    assert catalog.pending_bytes == 900 * len(tickets)
    assert (catalog.file(block.hash) is not None, catalog.pending(block.hash)) == (present, pending)


def test_only_the_latest_expectation_of_an_absent_block_is_wanted() -> None:
    catalog, block = Catalog(), BLOCKS[0]
    old = catalog.expect(block, 1)
    catalog.forget(block.hash)
    first, second = (catalog.expect(block, 1) for _ in range(2))
    assert [catalog.wanted(ticket) for ticket in (old, first, second)] == [False, True, True]
    assert not catalog.settle(old, None)
    assert catalog.settle(first, file_of(block))
    assert not catalog.wanted(second)
    assert catalog.settle(second, None)
    late = catalog.expect(block, 1)
    assert not catalog.wanted(late)
    assert catalog.settle(late, None)
    assert catalog.pending_bytes == 0
    catalog.check()


def test_a_file_written_later_is_not_forgotten_for_the_one_before() -> None:
    catalog, block = Catalog(), BLOCKS[0]
    bad, good = file_of(block), file_of(block)
    catalog.load(bad, 1)
    assert catalog.forget_file(bad)
    catalog.settle(catalog.expect(block, 1), good)
    assert not catalog.forget_file(bad)
    assert catalog.file(block.hash) is good


def test_children_and_bytes() -> None:
    catalog = Catalog()
    first, second, *_ = BLOCKS
    tail = Block.of(first.hash, second.tokens[:40])
    for block in (first, second, tail):
        catalog.load(file_of(block), 0)
    assert catalog.children(ROOT) == [first]
    assert catalog.children(first.hash) == [second, tail]
    assert catalog.children(tail.hash) == []
    assert catalog.bytes_of([first.hash, first.hash, tail.hash, ROOT]) == 2000
    assert catalog.disk_bytes == 3000
    catalog.check()


def test_uses_are_ordered_and_taken_once() -> None:
    catalog = Catalog()
    for used, block in enumerate(BLOCKS):
        catalog.load(file_of(block), 10 - used)
    assert catalog.take_touched() == []
    catalog.touch([BLOCKS[2].hash, BLOCKS[0].hash, ROOT])
    assert sorted(catalog.take_touched()) == sorted([(BLOCKS[2].hash, 11), (BLOCKS[0].hash, 12)])
    assert catalog.take_touched() == []
    assert catalog.expect(BLOCKS[3], 1).clock == 13


def test_random_walk() -> None:
    rng = random.Random(5)
    catalog, present, waiting = Catalog(), dict[BlockHash, int](), list[tuple[Block, Ticket]]()
    for _ in range(2000):
        block = rng.choice(BLOCKS)
        match rng.randrange(4):
            case 0:
                waiting.append((block, catalog.expect(block, 7)))
            case 1 if waiting:
                block, ticket = waiting.pop(0)
                file = None
                if catalog.wanted(ticket) and rng.random() < 0.8:
                    file = file_of(block, rng.randrange(1, 99))
                    present[block.hash] = file.file_bytes
                assert catalog.settle(ticket, file) == (block.hash in present)
            case 2:
                catalog.forget(block.hash)
                present.pop(block.hash, None)
            case 3:
                catalog.touch([block.hash])
        catalog.check()
        assert catalog.disk_bytes == sum(present.values())
        assert catalog.pending_bytes == 7 * len(waiting)
        assert {b.hash for b in BLOCKS if catalog.file(b.hash)} == present.keys()
