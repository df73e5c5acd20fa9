"""What a start makes of what it finds."""

import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from queue import SimpleQueue

import pytest

from agent_memory.block import Block, BlockHash, chain
from agent_memory.errors import StateDirError
from agent_memory.kv_spec import KVSpec, LayerGroup, TensorFormat
from agent_memory.store import upkeep
from agent_memory.store.files import Bytes
from agent_memory.store.state_dir import StateDir
from tests.store.conftest import Opener


@pytest.fixture
def blocks(opener: Opener, spec: KVSpec) -> list[Block]:
    """A chain of three, on disk, owned by "a", in a store that was closed."""
    blocks = chain(spec.fingerprint, range(600))
    store = opener.open()
    opener.put(*blocks)
    store.record("a", spec.fingerprint, blocks)
    opener.close()
    return blocks


def present(opener: Opener, blocks: list[Block]) -> list[bool]:
    """By the index and by reading them, which must agree."""
    found = [opener.store.find(block.hash) == block for block in blocks]
    assert [opener.read(block) for block in blocks] == found
    return found


def head(opener: Opener) -> tuple[Block, ...]:
    agent = opener.store.agents.get("a")
    return agent.heads[0].chain if agent else ()


def test_after_a_clean_close_all_is_there(opener: Opener, blocks: list[Block]) -> None:
    opener.open()
    assert present(opener, blocks) == [True, True, True]
    assert head(opener) == tuple(blocks)


def test_a_missing_index_is_rebuilt_from_the_files(opener: Opener, blocks: list[Block]) -> None:
    (opener.path / "index.db").unlink()
    opener.open()
    assert present(opener, blocks) == [True, True, True]
    assert opener.store.children(blocks[0].hash) == [blocks[1]]
    assert head(opener) == ()
    opener.open()
    assert present(opener, blocks) == [True, True, True]


def scribble(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(random.Random(1).randbytes(path.stat().st_size - 4096))


def other_tables(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("DROP TABLE blocks")
        db.execute("CREATE TABLE blocks (name TEXT)")


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"not a database at all" * 1000),
        lambda path: path.write_bytes(path.read_bytes()[:5000]),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        scribble,
        other_tables,
    ],
    ids=["text", "cut", "zeros", "scribbled", "tables"],
)
def test_a_damaged_index_is_moved_aside_and_rebuilt(
    opener: Opener, blocks: list[Block], damage: Callable[[Path], None]
) -> None:
    damage(opener.path / "index.db")
    opener.open()
    assert present(opener, blocks) == [True, True, True]
    assert list((opener.path / "quarantine").glob("index.db.*"))


def test_an_empty_index_is_a_new_one(opener: Opener, blocks: list[Block]) -> None:
    (opener.path / "index.db").write_bytes(b"")
    opener.open()
    assert present(opener, blocks) == [True, True, True]


def test_of_mutated_indexes_none_misleads(opener: Opener, blocks: list[Block]) -> None:
    good = (opener.path / "index.db").read_bytes()
    rng = random.Random(4)
    for _ in range(40):
        raw = bytearray(good)
        for _ in range(rng.randrange(1, 20)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        (opener.path / "index.db").write_bytes(raw)
        opener.open()
        for block in blocks:
            assert opener.store.find(block.hash) in (block, None)
            opener.read(block)
        opener.put(*blocks)
        opener.close()


def test_an_index_in_use_is_left_alone(opener: Opener, blocks: list[Block]) -> None:
    with closing(sqlite3.connect(opener.path / "index.db")) as db:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StateDirError, match="locked by another program"):
            opener.open()
    opener.open()
    assert head(opener) == tuple(blocks)


@contextmanager
def no_room() -> Iterator[None]:
    """As on a full disk: no file of this process grows beyond a few pages."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def rebuild(opener: Opener) -> None:
    upkeep.rebuild(StateDir.unlocked(opener.path))


@pytest.mark.parametrize("start", [Opener.open, rebuild])
def test_an_index_that_cannot_be_opened_for_want_of_room_is_left_alone(
    opener: Opener, blocks: list[Block], start: Callable[[Opener], object]
) -> None:
    """It is good: once there is room again agents have what they had."""
    with no_room(), pytest.raises(StateDirError, match="Free some space"):
        start(opener)
    assert not list((opener.path / "quarantine").iterdir())
    opener.open()
    assert head(opener) == tuple(blocks)


@pytest.mark.requirement("B-17", "L-40")
def test_unfinished_files_are_swept(opener: Opener, blocks: list[Block]) -> None:
    for n in range(3):
        (opener.path / "tmp" / f"{n}").write_bytes(b"half a block")
    opener.open()
    assert not list((opener.path / "tmp").iterdir())
    assert opener.metric("orphans_swept_total") == 3


def test_a_row_without_its_file_goes(opener: Opener, blocks: list[Block]) -> None:
    opener.file(blocks[1]).unlink()
    opener.open()
    assert opener.metric("restore_rejected_total", reason="missing") == 1
    assert present(opener, blocks) == [True, False, True]
    assert head(opener) == (blocks[0],)
    assert opener.put(blocks[1]) == [True]
    opener.open()
    assert opener.metric("restore_rejected_total", reason="missing") == 0
    assert head(opener) == (blocks[0],)


def test_a_row_that_contradicts_itself_is_none(opener: Opener, blocks: list[Block]) -> None:
    with closing(sqlite3.connect(opener.path / "index.db")) as db, db:
        db.execute("UPDATE blocks SET tokens = ? WHERE hash = ?", (bytes(8), blocks[1].hash))
        db.execute("UPDATE blocks SET tokens = x'00' WHERE hash = ?", (blocks[2].hash,))
    opener.open()
    assert opener.metric("restore_rejected_total", reason="missing") == 0
    assert present(opener, blocks) == [True, True, True]
    assert head(opener) == tuple(blocks)


def test_a_file_of_the_wrong_size_goes_to_quarantine(opener: Opener, blocks: list[Block]) -> None:
    with opener.file(blocks[2]).open("ab") as file:
        file.write(b"more")
    opener.open()
    assert opener.metric("restore_rejected_total", reason="size") == 1
    assert opener.quarantined() == [blocks[2].hash.hex()]
    assert present(opener, blocks) == [True, True, False]
    assert head(opener) == tuple(blocks[:2])


def test_a_file_too_large_for_memory_is_refused_unread(opener: Opener, blocks: list[Block]) -> None:
    """The index does not know it, so nobody knows how large it should be."""
    (opener.path / "index.db").unlink()
    os.truncate(opener.file(blocks[1]), 1 << 42)  # it takes no room
    opener.open()
    assert opener.metric("restore_rejected_total", reason="size") == 1
    assert present(opener, blocks) == [True, False, True]
    assert not opener.file(blocks[1]).exists()


def test_heads_that_become_prefixes_are_merged(opener: Opener, blocks: list[Block]) -> None:
    other = chain(opener.spec.fingerprint, [*range(512), 7, 7, 7])
    opener.open()
    opener.put(other[-1])
    opener.store.record("a", opener.spec.fingerprint, other)
    opener.close()
    opener.file(blocks[2]).unlink()
    opener.open()
    agent = opener.store.agents.get("a")
    assert agent is not None and [h.chain for h in agent.heads] == [tuple(other)]


def test_a_head_that_is_no_chain_is_cut_where_it_breaks(
    opener: Opener, blocks: list[Block]
) -> None:
    with closing(sqlite3.connect(opener.path / "index.db")) as db, db:
        db.execute("UPDATE heads SET chain = ?", (blocks[0].hash + blocks[2].hash,))
    opener.open()
    assert head(opener) == (blocks[0],)


def test_an_agent_with_nothing_left_is_forgotten(opener: Opener, blocks: list[Block]) -> None:
    opener.file(blocks[0]).unlink()
    opener.open()
    assert opener.store.agents.all() == []


def test_found_files_are_adopted_only_when_proved(opener: Opener, blocks: list[Block]) -> None:
    (opener.path / "index.db").unlink()
    first, second, third = (opener.file(block) for block in blocks)
    raw = bytearray(first.read_bytes())
    raw[-1] ^= 1
    first.write_bytes(raw)
    third.write_bytes(second.read_bytes())
    opener.open()
    assert present(opener, blocks) == [False, True, False]
    assert sorted(opener.quarantined()) == sorted([blocks[0].hash.hex(), blocks[2].hash.hex()])
    assert opener.metric("restore_rejected_total", reason="checksum") == 1
    assert opener.metric("restore_rejected_total", reason="tokens") == 1


def test_names_that_are_not_ours_are_left_alone(opener: Opener, blocks: list[Block]) -> None:
    folder = opener.file(blocks[0]).parent
    strange = [folder / ".DS_Store", folder / "00.safetensors", folder / f"{'zz' * 32}.safetensors"]
    elsewhere = opener.path / "blocks" / ("00" if folder.name != "00" else "01")
    strange += [elsewhere / opener.file(blocks[0]).name, opener.path / "blocks" / "note.txt"]
    for path in strange:
        path.write_bytes(b"theirs")
    opener.open()
    assert present(opener, blocks) == [True, True, True]
    assert all(path.read_bytes() == b"theirs" for path in strange)


@pytest.mark.requirement("S-20")
def test_a_planted_link_is_not_followed(opener: Opener, blocks: list[Block]) -> None:
    kept = opener.path / "kept"
    path = opener.file(blocks[0])
    shutil.copyfile(path, kept)
    path.unlink()
    path.symlink_to(kept)
    opener.open()
    assert present(opener, blocks) == [False, True, True]
    (opener.path / "index.db").unlink()
    path.symlink_to(kept)
    opener.open()
    assert present(opener, blocks) == [False, True, True]


@pytest.mark.timeout(10)
def test_a_pipe_in_the_place_of_a_file_keeps_nobody_waiting(
    opener: Opener, blocks: list[Block]
) -> None:
    (opener.path / "index.db").unlink()
    opener.file(blocks[0]).unlink()
    os.mkfifo(opener.file(blocks[0]))
    opener.open()
    assert present(opener, blocks) == [False, True, True]
    assert opener.metric("restore_rejected_total", reason="size") == 1


@pytest.mark.parametrize("version", [b"2\n", b"", None], ids=repr)
def test_a_store_of_another_version_is_set_aside_whole(
    opener: Opener, blocks: list[Block], version: bytes | None
) -> None:
    path = opener.path / "VERSION"
    assert path.read_bytes() == b"3\n"
    path.unlink()
    if version is not None:
        path.write_bytes(version)
    opener.open()
    assert present(opener, blocks) == [False, False, False]
    assert opener.put(*blocks) == [True, True, True]
    aside = opener.path / "set-aside-1"
    assert (aside / opener.file(blocks[0]).relative_to(opener.path)).exists()
    assert (aside / "index.db").exists()
    opener.open()
    assert present(opener, blocks) == [True, True, True]
    assert not (opener.path / "set-aside-2").exists()


def test_a_directory_that_cannot_be_prepared_says_so(opener: Opener) -> None:
    opener.path.mkdir()
    (opener.path / "VERSION").mkdir()
    with pytest.raises(StateDirError, match="cannot be prepared: .*choose another"):
        opener.open()


WRITE_UNTIL_KILLED = """
import os, sys
from pathlib import Path
import numpy as np
from agent_memory.block import chain
from agent_memory.kv_spec import KVSpec, LayerGroup, TensorFormat
from agent_memory.metrics import Metrics
from agent_memory.store.block_store import BlockStore
from agent_memory.store.state_dir import StateDir

form = TensorFormat(64, "BF16")
spec = KVSpec((LayerGroup("full", (0,), 1, form, form),), "killed")
store = BlockStore.open(StateDir.open(Path(sys.argv[1])), Metrics())

def say(word, block_hash):
    os.write(1, f"{word} {block_hash.hex()}\\n".encode())

def told(block_hash, present):
    say("present" if present else "absent", block_hash)

tokens, tail = [int(sys.argv[2])], None
for turn in range(10_000):
    tokens += [turn] * 50
    blocks = chain(spec.fingerprint, tokens)
    for block in blocks:
        if not store.find(block.hash) and not store.pending(block.hash):
            payload = np.full(spec.payload_bytes(block.num_tokens), block.hash[0], np.uint8)
            store.put(block, payload, spec, told)
    if tail:
        say("superseding", tail)
    store.record("a", spec.fingerprint, blocks)
    tail = None if blocks[-1].full else blocks[-1].hash
    if turn % 3:
        store.flush(10)
"""


def told_by_a_killed_process(path: Path, seed: int, num_lines: int) -> dict[str, set[BlockHash]]:
    """What it said of its blocks until it was killed, which is soon after `num_lines`."""
    command = [sys.executable, "-c", WRITE_UNTIL_KILLED, str(path), str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(num_lines)]
        child.send_signal(signal.SIGKILL)
        lines += child.stdout.readlines()
    told: dict[str, set[BlockHash]] = {"present": set(), "superseding": set(), "absent": set()}
    for line in lines:
        word, text = line.split()
        told[word].add(BlockHash(bytes.fromhex(text)))
    return told


@pytest.mark.requirement("L-39")
def test_kill_9_loses_nothing_that_was_told_to_be_on_disk(opener: Opener) -> None:
    rng = random.Random(2)
    for seed in range(4):
        told = told_by_a_killed_process(opener.path, seed, rng.randrange(20, 60))
        store = opener.open()
        assert not list((opener.path / "tmp").iterdir())
        assert opener.quarantined() == []
        assert opener.metric("restore_rejected_total", reason="missing") == 0

        owed = told["present"] - told["superseding"]
        kept = [store.find(block_hash) for block_hash in owed]
        assert owed and None not in kept
        assert told["absent"] <= told["superseding"]
        assert all(payload_is_right(opener, block) for block in kept if block)
        opener.close()


def payload_is_right(opener: Opener, block: Block) -> bool:
    form = TensorFormat(64, "BF16")
    spec = KVSpec((LayerGroup("full", (0,), 1, form, form),), "killed")
    told: SimpleQueue[Bytes | None] = SimpleQueue()
    opener.store.read(block, spec, lambda _, payload: told.put(payload))
    payload = told.get(timeout=5)
    return payload is not None and set(payload.tolist()) == {block.hash[0]}
