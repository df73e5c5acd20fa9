"""The store as its users see it: put, find, read, record, close and come back."""

import random
import sqlite3
import threading
import time
import weakref
from contextlib import closing
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt
import pytest

from agent_memory.block import Block, BlockHash, chain
from agent_memory.kv_spec import KVSpec
from agent_memory.store.jobs import OnWritten
from tests.marks import first_is_fast
from tests.store.conftest import Opener, PayloadOf


def waits_for(gate: threading.Event) -> OnWritten:
    def on_written(_hash: BlockHash, _present: bool) -> None:
        assert gate.wait(10)

    return on_written


def test_put_find_read(opener: Opener, blocks: list[Block]) -> None:
    store = opener.open()
    assert store.find(blocks[0].hash) is None
    assert opener.put(*blocks) == [True, True, True]
    assert [store.find(block.hash) for block in blocks] == blocks
    assert store.children(blocks[0].hash) == [blocks[1]]
    assert all(opener.read(block) for block in blocks)
    assert store.disk_bytes == sum(opener.file(block).stat().st_size for block in blocks)
    assert store.disk_bytes == opener.metric("disk_bytes") == opener.metric("bytes_written_total")
    assert store.bytes_of([blocks[0].hash]) == opener.file(blocks[0]).stat().st_size
    assert opener.metric("blocks_written_total") == 3
    assert oct(opener.file(blocks[0]).stat().st_mode) == "0o100600"
    assert not list(opener.state.tmp.iterdir())


def test_what_is_read_is_the_callers_own(opener: Opener, blocks: list[Block]) -> None:
    store = opener.open()
    opener.put(blocks[0])
    told: SimpleQueue[object] = SimpleQueue()
    store.read(blocks[0], opener.spec, lambda block, payload: told.put(payload))
    payload = told.get(timeout=5)
    assert isinstance(payload, np.ndarray) and payload.dtype == np.uint8 and payload.ndim == 1
    payload[:] = 0
    assert opener.read(blocks[0])


def test_no_thread_keeps_a_payload(opener: Opener, blocks: list[Block]) -> None:
    store = opener.open()
    payload = opener.payload_of(blocks[0])
    gone = [weakref.ref(payload)]
    store.put(blocks[0], payload, opener.spec, lambda *_: None)
    del payload
    assert store.flush(5)

    def deliver(_block: Block, payload: npt.NDArray[np.uint8] | None) -> None:
        assert payload is not None
        gone.append(weakref.ref(payload))

    store.read(blocks[0], opener.spec, deliver)
    deadline = time.monotonic() + 5
    while (len(gone) < 2 or any(ref() is not None for ref in gone)) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert [ref() for ref in gone] == [None, None]


def test_on_disk_well_within_a_second(opener: Opener, blocks: list[Block]) -> None:
    store = opener.open()
    began, done = time.monotonic(), threading.Event()
    store.put(blocks[0], opener.payload_of(blocks[0]), opener.spec, lambda *_: done.set())
    store.record("a", opener.spec.fingerprint, blocks[:1])
    assert done.wait(1) and store.flush(1)
    assert time.monotonic() - began < 1


def test_a_block_put_again_is_not_written_again(opener: Opener, blocks: list[Block]) -> None:
    opener.open()
    assert opener.put(blocks[0], blocks[0], blocks[0]) == [True, True, True]
    assert opener.put(blocks[0]) == [True]
    assert opener.metric("blocks_written_total") == 1


def test_pending_until_told(opener: Opener, blocks: list[Block]) -> None:
    store, gate = opener.open(), threading.Event()
    store.put(blocks[0], opener.payload_of(blocks[0]), opener.spec, waits_for(gate))
    while store.pending(blocks[0].hash):
        time.sleep(0.001)
    payload = opener.payload_of(blocks[1])
    store.put(blocks[1], payload, opener.spec, lambda *_: None)
    assert store.pending(blocks[1].hash) and store.find(blocks[1].hash) is None
    assert store.pending_bytes == payload.nbytes
    assert not store.flush(0.01)
    gate.set()
    assert store.flush(5)
    assert not store.pending(blocks[1].hash) and store.find(blocks[1].hash) == blocks[1]
    assert store.pending_bytes == 0


def test_more_than_one_batch(opener: Opener, spec: KVSpec) -> None:
    many = [chain(spec.fingerprint, [n])[0] for n in range(100)]
    opener.open()
    assert all(opener.put(*many))
    opener.open()
    assert len(opener.store.children(spec.fingerprint)) == 100


def test_a_callback_that_raises_takes_nothing_down(opener: Opener, blocks: list[Block]) -> None:
    store = opener.open()

    def fail(*_: object) -> None:
        raise RuntimeError("theirs")

    store.put(blocks[0], opener.payload_of(blocks[0]), opener.spec, fail)
    assert opener.put(blocks[1]) == [True]
    store.read(blocks[0], opener.spec, fail)
    store.read(blocks[0], opener.spec, fail)
    assert opener.read(blocks[0]) and opener.read(blocks[1])


def test_a_superseded_tail_goes(opener: Opener, spec: KVSpec) -> None:
    store, root = opener.open(), spec.fingerprint
    first, second = chain(root, range(300)), chain(root, range(320))
    opener.put(*first)
    assert store.record("a", root, first) == ()
    opener.put(*second)
    assert store.record("a", root, second) == (first[-1],)
    assert store.find(first[-1].hash) is None
    assert store.flush(5)
    assert not opener.file(first[-1]).exists() and opener.file(second[-1]).exists()
    opener.open()
    assert opener.store.find(first[-1].hash) is None
    assert all(opener.read(block) for block in second)


def test_a_tail_superseded_before_it_was_written_is_not_written(
    opener: Opener, spec: KVSpec
) -> None:
    store, root, gate = opener.open(), spec.fingerprint, threading.Event()
    other, [tail], [longer] = chain(root, [9]), chain(root, range(30)), chain(root, range(31))
    store.put(other[0], opener.payload_of(other[0]), spec, waits_for(gate))
    told: SimpleQueue[tuple[BlockHash, bool]] = SimpleQueue()
    for block in (tail, longer):
        store.put(block, opener.payload_of(block), spec, lambda *a: told.put(a))
        store.record("a", root, [block])
    gate.set()
    assert [told.get(timeout=5) for _ in range(2)] == [(tail.hash, False), (longer.hash, True)]
    assert store.flush(5)
    assert not opener.file(tail).exists()
    assert opener.metric("blocks_written_total") == 2


def test_a_tail_wanted_again_after_it_was_superseded_is_kept(opener: Opener, spec: KVSpec) -> None:
    """The engine's order: superseded, let go of, then another agent ends a turn with it."""
    store, root, gate = opener.open(), spec.fingerprint, threading.Event()
    other, [tail], [longer] = chain(root, [9]), chain(root, range(30)), chain(root, range(31))
    opener.put(tail)
    store.record("a", root, [tail])
    store.put(other[0], opener.payload_of(other[0]), spec, waits_for(gate))
    store.put(longer, opener.payload_of(longer), spec, lambda *_: None)
    assert store.record("a", root, [longer]) == (tail,)
    assert store.find(tail.hash) is None
    done: SimpleQueue[bool] = SimpleQueue()
    store.put(tail, opener.payload_of(tail), spec, lambda _, present: done.put(present))
    store.record("b", root, [tail])
    gate.set()
    assert done.get(timeout=5) and store.flush(5)
    assert opener.read(tail)
    opener.open()
    assert opener.read(tail)
    agent = opener.store.agents.get("b")
    assert agent is not None and agent.heads[0].chain == (tail,)


def test_agents_come_back(opener: Opener, blocks: list[Block], spec: KVSpec) -> None:
    store = opener.open()
    opener.put(*blocks)
    store.record("b", spec.fingerprint, blocks[:1])
    store.record("a", spec.fingerprint, blocks)
    before = store.agents.all()
    opener.open()
    after = opener.store.agents.all()
    assert [agent.id for agent in after] == ["a", "b"]
    assert [a.heads[0].chain for a in after] == [a.heads[0].chain for a in before]
    assert [a.last_used for a in after] == [a.last_used for a in before]


def test_the_order_of_use_comes_back(opener: Opener, blocks: list[Block]) -> None:
    store = opener.open()
    opener.put(*blocks)
    store.touch([blocks[0].hash])
    store.flush(5)
    assert order_of_use(opener) == [blocks[1].hash, blocks[2].hash, blocks[0].hash]
    opener.open().touch([blocks[1].hash])
    opener.close()
    assert order_of_use(opener) == [blocks[2].hash, blocks[0].hash, blocks[1].hash]


def order_of_use(opener: Opener) -> list[bytes]:
    with closing(sqlite3.connect(opener.path / "index.db")) as db:
        return [row[0] for row in db.execute("SELECT hash FROM blocks ORDER BY used")]


def test_after_close_everything_is_answered(opener: Opener, blocks: list[Block]) -> None:
    store = opener.open()
    opener.put(blocks[0])
    assert store.close(5) and store.close(5)
    told: SimpleQueue[object] = SimpleQueue()
    store.put(blocks[1], opener.payload_of(blocks[1]), opener.spec, lambda *a: told.put(a))
    assert told.get_nowait() == (blocks[1].hash, False)
    store.read(blocks[0], opener.spec, lambda *a: told.put(a))
    assert told.get_nowait() == (blocks[0], None)
    assert not store.pending(blocks[1].hash)
    store.check()


def test_close_settles_what_waits(opener: Opener, spec: KVSpec) -> None:
    store, told = opener.open(), list[bool]()
    many = [chain(spec.fingerprint, [n])[0] for n in range(50)]
    for n, block in enumerate(many):
        store.put(block, opener.payload_of(block), spec, lambda _, present: told.append(present))
        store.record(str(n), spec.fingerprint, [block])
    assert store.close(10)
    assert told == [True] * 50


def test_close_says_when_it_takes_too_long(opener: Opener, blocks: list[Block]) -> None:
    store, gate = opener.open(), threading.Event()
    store.put(blocks[0], opener.payload_of(blocks[0]), opener.spec, waits_for(gate))
    assert not store.close(0.05)
    gate.set()
    assert store.close(5)


class Walk:
    """A model of the store, and the steps that must leave both in agreement."""

    def __init__(self, opener: Opener, seed: int) -> None:
        self.opener = opener
        self.rng = random.Random(seed)
        self.present: set[Block] = set()
        root = opener.spec.fingerprint
        ends = [[n, *range(m)] for n in (1, 2) for m in (5, 6, 300)]
        self.chains = [chain(root, [*range(256), *end]) for end in ends]
        self.blocks = list({block.hash: block for c in self.chains for block in c}.values())
        opener.open()

    def put(self) -> None:
        block = self.rng.choice(self.blocks)
        assert self.opener.put(block) == [True]
        self.present.add(block)

    def turn(self) -> None:
        conversation = self.rng.choice(self.chains)
        assert all(self.opener.put(*conversation))
        self.present |= set(conversation)
        gone = self.opener.store.record(
            self.rng.choice("ab"), self.opener.spec.fingerprint, conversation
        )
        self.present -= set(gone)

    def read(self) -> None:
        block = self.rng.choice(self.blocks)
        assert self.opener.read(block) == (block in self.present)

    def spoil(self) -> None:
        if block := self._any_present():
            path = self.opener.file(block)
            raw = bytearray(path.read_bytes())
            raw[self.rng.randrange(len(raw))] ^= 1
            path.write_bytes(raw)
            assert not self.opener.read(block)
            self.present.remove(block)

    def lose(self) -> None:
        if block := self._any_present():
            self.opener.store.flush(5)
            self.opener.file(block).unlink()
            assert not self.opener.read(block)
            self.present.remove(block)

    def reopen(self) -> None:
        if self.rng.random() < 0.3:
            self.opener.close()
            self.opener.path.joinpath("index.db").unlink()
        self.opener.open()

    def check(self) -> None:
        store = self.opener.store
        store.check()
        assert store.flush(5)
        assert {block for block in self.blocks if store.find(block.hash)} == self.present
        files = self.opener.path.glob("blocks/*/*")
        assert set(files) == {self.opener.file(block) for block in self.present}

    def _any_present(self) -> Block | None:
        present = sorted(self.present, key=lambda block: block.hash)
        return self.rng.choice(present) if present else None


@pytest.mark.parametrize("seed", first_is_fast(*range(3)))
def test_random_walk(opener: Opener, seed: int) -> None:
    walk = Walk(opener, seed)
    steps = [walk.put, walk.turn, walk.read, walk.spoil, walk.lose, walk.reopen]
    for _ in range(100):
        walk.rng.choice(steps)()
        walk.check()


def test_many_threads_at_once(opener: Opener, spec: KVSpec, payload_of: PayloadOf) -> None:
    store, errors = opener.open(), list[BaseException]()
    many = [chain(spec.fingerprint, [n])[0] for n in range(40)]

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(60):
                block = rng.choice(many)
                match rng.randrange(4):
                    case 0:
                        store.put(block, payload_of(block), spec, lambda *_: None)
                    case 1:
                        store.read(block, spec, lambda *_: None)
                    case 2:
                        store.touch([block.hash])
                    case 3:
                        store.check()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert store.flush(10)
    store.check()
    assert all(opener.read(block) for block in many if store.find(block.hash))


@pytest.mark.requirement("S-04")
def test_the_directory_is_private_throughout(opener: Opener, blocks: list[Block]) -> None:
    opener.open()
    opener.put(*blocks)

    def bits(path: Path) -> int:
        return path.stat().st_mode & 0o077

    assert [path for path in opener.path.rglob("*") if bits(path)] == []
