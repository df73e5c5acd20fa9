"""Disks that fill up, files that go bad while open, an index that cannot be written."""

import io
import resource
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from queue import SimpleQueue

import pytest
import structlog
from structlog.testing import capture_logs

from agent_memory.block import Block, chain
from agent_memory.kv_spec import KVSpec
from agent_memory.metrics import Metrics
from agent_memory.store.block_files import BlockFiles
from agent_memory.store.days import Days
from agent_memory.store.jobs import Quarantine, WriteBlock
from agent_memory.store.limits import Budget
from agent_memory.store.recover import recover
from agent_memory.store.state_dir import StateDir
from agent_memory.store.writer import Writer
from tests.store.conftest import Opener


@contextmanager
def no_file_above(num_bytes: int) -> Iterator[None]:
    """Longer writes fail with EFBIG, the first of them after a short write: a full disk's ways."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_fails_the_block_and_nothing_else(opener: Opener, blocks: list[Block]) -> None:
    store = opener.open()
    opener.put(blocks[0])
    with no_file_above(20_000), capture_logs() as logs:
        assert opener.put(blocks[1]) == [False]
        assert opener.put(blocks[1]) == [False]
    assert [log["kind"] for log in logs] == ["EFBIG"]
    assert opener.metric("persist_errors_total", errno="EFBIG") == 2
    assert not store.pending(blocks[1].hash) and store.find(blocks[1].hash) is None
    assert not list(opener.state.tmp.iterdir()) and not opener.file(blocks[1]).exists()
    store.check()
    assert opener.put(blocks[1]) == [True]
    assert opener.read(blocks[0]) and opener.read(blocks[1])


def test_small_blocks_of_the_batch_are_written_beside_one_too_large(
    opener: Opener, spec: KVSpec, blocks: list[Block]
) -> None:
    small = chain(spec.fingerprint, [1])[0]
    opener.open()
    opener.open()  # so that the index, which is a file too, is made already
    with no_file_above(56_000):
        assert opener.put(small, blocks[0], small) == [True, False, True]
    assert opener.read(small)


def test_an_index_that_cannot_be_written_fails_the_batch(
    opener: Opener, blocks: list[Block], spec: KVSpec
) -> None:
    store = opener.open()
    assert opener.put(blocks[0]) == [True]
    with closing(sqlite3.connect(opener.state.index)) as db:
        db.execute("BEGIN IMMEDIATE")
        assert opener.put(blocks[1]) == [False]
        db.rollback()
    assert opener.metric("persist_errors_total", errno="SQLITE_BUSY") == 1
    assert store.find(blocks[1].hash) is None
    store.check()
    opener.open()  # the file was whole: it is adopted
    assert opener.read(blocks[1])


def test_a_head_whose_record_failed_comes_back_with_the_next(
    opener: Opener, blocks: list[Block], spec: KVSpec
) -> None:
    store, root = opener.open(), spec.fingerprint
    opener.put(*blocks)
    store.record("a", root, blocks[:1])
    assert store.flush(5)
    with closing(sqlite3.connect(opener.state.index)) as db:
        db.execute("BEGIN IMMEDIATE")
        store.record("a", root, blocks[:2])
        assert store.flush(5)
        db.rollback()
    store.record("a", root, blocks)
    opener.open()
    agent = opener.store.agents.get("a")
    assert agent is not None and [head.chain for head in agent.heads] == [tuple(blocks)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device to log to")
def test_a_log_on_the_full_disk_takes_nothing_down(opener: Opener, blocks: list[Block]) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("theirs")

    store = opener.open()
    with io.TextIOWrapper(io.FileIO("/dev/full", "w"), write_through=True) as full:
        structlog.configure(logger_factory=structlog.PrintLoggerFactory(full))
        try:
            assert not opener.read(blocks[0])
            opener.file(blocks[0]).parent.rmdir()
            assert opener.put(blocks[0]) == [False]
            store.read(blocks[0], opener.spec, fail)
            store.put(blocks[1], opener.payload_of(blocks[1]), opener.spec, fail)
            assert opener.put(blocks[2]) == [True]
            assert opener.read(blocks[1]) and opener.read(blocks[2])
        finally:
            structlog.reset_defaults()


def test_a_folder_that_went_away(opener: Opener, blocks: list[Block]) -> None:
    opener.open()
    folder = opener.file(blocks[0]).parent
    folder.rmdir()
    assert opener.put(blocks[0]) == [False]
    assert opener.metric("persist_errors_total", errno="ENOENT") == 1
    assert not list(opener.state.tmp.iterdir())
    folder.mkdir()
    assert opener.put(blocks[0]) == [True]


def test_what_would_spoil_a_batch_is_stopped_at_the_door(
    opener: Opener, blocks: list[Block], spec: KVSpec
) -> None:
    store = opener.open()
    with pytest.raises(AssertionError):
        store.put(blocks[0], opener.payload_of(blocks[0])[:-1], spec, lambda *_: None)
    with pytest.raises(AssertionError):
        store.record("\ud800", spec.fingerprint, blocks)
    assert store.pending_bytes == 0 and store.agents.all() == []
    assert opener.put(blocks[0]) == [True]


def flip_last_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def other_window(path: Path) -> None:
    raw = path.read_bytes()
    changed = raw.replace(b'\\"window\\":128', b'\\"window\\":256', 1)
    assert changed != raw
    path.write_bytes(changed)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.requirement("B-17")
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (flip_last_byte, "checksum"),
        (truncate, "size"),
        (other_window, "shape"),
        (Path.unlink, "missing"),
        (folder_instead, "size"),
    ],
)
def test_a_file_gone_bad_is_a_miss_and_can_be_written_anew(
    opener: Opener, blocks: list[Block], spoil: Callable[[Path], None], reason: str
) -> None:
    store = opener.open()
    opener.put(*blocks)
    spoil(opener.file(blocks[1]))
    assert not opener.read(blocks[1])
    assert opener.metric("restore_rejected_total", reason=reason) == 1
    assert store.find(blocks[1].hash) is None and store.children(blocks[0].hash) == []
    assert opener.quarantined() == ([] if reason == "missing" else [blocks[1].hash.hex()])
    assert not opener.file(blocks[1]).exists()
    store.check()
    assert opener.put(blocks[1]) == [True]
    opener.open()
    assert all(opener.read(block) for block in blocks)


@pytest.mark.requirement("S-20")
def test_a_link_in_a_files_place_is_not_followed(opener: Opener, blocks: list[Block]) -> None:
    opener.open()
    opener.put(blocks[0])
    path = opener.file(blocks[0])
    kept = path.rename(opener.path / "kept")
    path.symlink_to(kept)
    assert not opener.read(blocks[0])
    assert kept.exists() and not path.is_symlink()


def test_out_of_descriptors_the_file_is_left_alone(opener: Opener, blocks: list[Block]) -> None:
    store = opener.open()
    opener.put(blocks[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        assert not opener.read(blocks[0])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert opener.metric("restore_rejected_total", reason="io") == 1
    assert store.find(blocks[0].hash) and opener.quarantined() == []
    assert opener.read(blocks[0])


def test_a_block_that_was_never_here_is_missing(opener: Opener, blocks: list[Block]) -> None:
    opener.open()
    assert not opener.read(blocks[0])
    assert opener.metric("restore_rejected_total", reason="missing") == 1


def test_a_bad_file_is_out_of_sight_before_the_writer_comes_to_it(
    opener: Opener, blocks: list[Block]
) -> None:
    store, gate = opener.open(), threading.Event()
    opener.put(blocks[0])
    flip_last_byte(opener.file(blocks[0]))
    payload = opener.payload_of(blocks[1])
    store.put(blocks[1], payload, opener.spec, lambda *_: hold(gate))
    told = SimpleQueue[object]()
    store.read(blocks[0], opener.spec, lambda _, payload: told.put(payload))
    assert told.get(timeout=5) is None
    assert store.find(blocks[0].hash) is None
    gate.set()
    assert store.flush(5) and opener.quarantined() == [blocks[0].hash.hex()]


def hold(gate: threading.Event) -> None:
    assert gate.wait(10)


def test_a_good_file_is_not_quarantined_for_the_bad_one_before_it(
    opener: Opener, blocks: list[Block], spec: KVSpec
) -> None:
    """The writer told late: the file it is told of has been replaced."""
    state, metrics, told = StateDir.open(opener.path), Metrics(), SimpleQueue[bool]()
    index, catalog, agents, _ = recover(state, metrics)
    budget = Budget(opener.limits, state.path, Days([]))
    on_disk = BlockFiles(state, metrics)
    writer = Writer(on_disk, index, catalog, agents, budget, metrics, lambda cut: None)
    writer.start(lambda clock: False)
    files = []
    for _ in range(2):
        ticket = catalog.expect(blocks[0], 1)
        payload = opener.payload_of(blocks[0])
        writer.submit(WriteBlock(blocks[0], payload, spec, ticket, lambda _, ok: told.put(ok)))
        assert told.get(timeout=5)
        files.append(catalog.file(blocks[0].hash))
        if file := files[0]:
            catalog.forget_file(file)
    assert files[0] is not None and catalog.file(blocks[0].hash) is files[1]
    writer.submit(Quarantine(files[0]))
    assert writer.close(5)
    state.close()
    opener.open()
    assert opener.read(blocks[0]) and opener.quarantined() == []


def test_two_readers_of_one_bad_file(opener: Opener, blocks: list[Block]) -> None:
    store, told = opener.open(), SimpleQueue[object]()
    opener.put(blocks[0])
    flip_last_byte(opener.file(blocks[0]))
    for _ in range(10):
        store.read(blocks[0], opener.spec, lambda _, payload: told.put(payload))
    assert [told.get(timeout=5) for _ in range(10)] == [None] * 10
    assert opener.put(blocks[0]) == [True]
    assert opener.read(blocks[0])
    assert opener.quarantined() == [blocks[0].hash.hex()]
