"""Checkpoints in the store: what goes with them, and that losing one loses nothing else."""

import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from agent_memory.block import Block, Loss, chain, token_bytes
from agent_memory.errors import StateDirError
from agent_memory.kv_spec import KVSpec
from agent_memory.metrics import Metrics
from agent_memory.store import upkeep
from agent_memory.store.format import full_file_bytes
from agent_memory.store.limits import Limits
from agent_memory.store.look import look, verify
from agent_memory.store.recover import recover
from agent_memory.store.state_dir import StateDir
from tests.marks import first_is_fast
from tests.store.conftest import CheckpointAt, Opener, names


@pytest.fixture
def remembered(opener: Opener, blocks: list[Block], checkpoints: list[Block]) -> Opener:
    """A store that is open, in which "a" has all of them in mind."""
    store = opener.open()
    assert all(opener.put(*blocks, *checkpoints, agent_id="a"))
    store.record("a", opener.spec.fingerprint, blocks, (10, 600), checkpoints)
    return opener


def head(opener: Opener) -> tuple[int, list[Block]]:
    """(tokens, checkpoints)"""
    newest = opener.store.agents.known("a").heads[0]
    return newest.num_tokens, list(newest.checkpoints)


def test_they_come_back_and_are_no_blocks(
    remembered: Opener, blocks: list[Block], checkpoints: list[Block]
) -> None:
    for _ in range(2):
        store = remembered.store
        assert head(remembered) == (600, checkpoints)
        assert all(remembered.read(block) for block in [*blocks, *checkpoints])
        assert [store.find(c.hash) for c in checkpoints] == checkpoints
        assert store.children(blocks[0].hash) == [blocks[1]]
        assert set(store.checkpoints(blocks[0].hash)) == set(checkpoints[1:3])
        assert store.agents.known("a").bytes_written == store.disk_bytes
        remembered.open()


def test_they_come_back_from_files_alone(
    remembered: Opener, blocks: list[Block], checkpoints: list[Block]
) -> None:
    remembered.close()
    (remembered.path / "index.db").unlink()
    store = remembered.open()
    assert all(remembered.read(block) for block in [*blocks, *checkpoints])
    assert [store.find(c.hash) for c in checkpoints] == checkpoints
    store.record("a", remembered.spec.fingerprint, blocks, None, checkpoints)
    remembered.open()
    assert head(remembered) == (600, checkpoints)


def test_rewinding_and_removing_leave_no_file_without_an_owner(
    remembered: Opener, blocks: list[Block], checkpoints: list[Block]
) -> None:
    store = remembered.store
    store.fork("a", "b")
    store.rewind("a", 300)
    assert remembered.files() == names(*blocks, *checkpoints)
    assert store.remove("b") == {block.hash for block in (blocks[2], *checkpoints[3:])}
    assert remembered.files() == names(*blocks[:2], *checkpoints[:3])
    remembered.open()
    assert head(remembered) == (300, checkpoints[:3])
    gone = [*blocks[:2], *checkpoints[:3]]
    assert remembered.store.remove("a") == {block.hash for block in gone}
    assert remembered.files() == set() and remembered.store.disk_bytes == 0
    raw = b"".join(path.read_bytes() for path in remembered.path.rglob("*") if path.is_file())
    traces = [bytes(checkpoint.hash) for checkpoint in checkpoints]
    assert not any(trace in raw for trace in traces)


def test_what_is_recorded_replaces_what_was(
    remembered: Opener, spec: KVSpec, blocks: list[Block], checkpoints: list[Block]
) -> None:
    store, longer = remembered.store, chain(spec.fingerprint, range(700))
    assert remembered.put(longer[-1]) == [True]
    gone = store.record("a", spec.fingerprint, longer, (610, 700), checkpoints[3:])
    assert set(gone) == {blocks[2], *checkpoints[:3]}
    assert [block.is_checkpoint for block in gone] == [True, True, True, False]
    assert remembered.files() == names(*longer, *checkpoints[3:])
    assert not any(store.gone.why(block.hash) for block in gone)


def test_one_pushed_out_is_not_missed(remembered: Opener, spec: KVSpec) -> None:
    store = remembered.store
    for n in range(8):
        talk = chain(spec.fingerprint, [1000 + n] * 300)
        remembered.put(*talk)
        gone = store.record("a", spec.fingerprint, talk)
    assert len(gone) == 8
    assert [store.gone.why(b.hash) for b in gone] == [
        None if block.is_checkpoint else Loss.EVICTED for block in gone
    ]


def test_one_whose_file_was_never_written_is_forgotten_at_the_next_start(
    opener: Opener, spec: KVSpec, blocks: list[Block], checkpoints: list[Block]
) -> None:
    store = opener.open()
    opener.put(*blocks, *checkpoints[1:])
    store.record("a", spec.fingerprint, blocks, None, checkpoints)
    assert head(opener) == (600, checkpoints)
    opener.open()
    assert head(opener) == (600, checkpoints[1:])


@pytest.mark.parametrize("seed", first_is_fast(*range(2)))
def test_random_lives(opener: Opener, spec: KVSpec, checkpoint_at: CheckpointAt, seed: int) -> None:
    """Just those files are there that somebody owns, and everything reads back."""
    rng = random.Random(seed)
    opener.open()
    for _ in range(100):
        store, agent_id = opener.store, rng.choice("ab")
        known = store.agents.get(agent_id)
        match rng.randrange(7) if known else 6:
            case 0:
                store.remove(agent_id)
            case 1 if known:
                store.rewind(agent_id, rng.randrange(1, known.heads[0].num_tokens + 1))
            case 2 if store.agents.get("c") is None:
                store.fork(agent_id, "c")
            case 3 if store.agents.get("c"):
                store.remove("c")
            case 4:
                opener.open()
            case _:
                tokens = [*range(rng.choice([3, 256, 300, 520])), rng.randrange(4)]
                ends = sorted(rng.choices(range(1, len(tokens) + 1), k=rng.randrange(4)))
                mine = [checkpoint_at(tokens, end) for end in ends]
                blocks = chain(spec.fingerprint, tokens)
                opener.put(*blocks, *mine, agent_id=agent_id)
                store.record(agent_id, spec.fingerprint, blocks, None, mine)
        owned = {h for agent in opener.store.agents.all() for h in agent.owned()}
        assert opener.files() == {block_hash.hex() for block_hash in owned}


# ── files that go ────────────────────────────────────────────────────────────────────────────────


def flipped(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("spoil", [flipped, shortened, Path.unlink])
@pytest.mark.parametrize("how", ["read", "scrubbed", "found"])
def test_a_damaged_one_is_quarantined_and_no_block_with_it(
    how: str,
    spoil: Callable[[Path], None],
    remembered: Opener,
    blocks: list[Block],
    checkpoints: list[Block],
) -> None:
    bad, left = checkpoints[2], [*checkpoints[:2], *checkpoints[3:]]
    store = remembered.store
    if how == "found":
        remembered.close()
    spoil(remembered.file(bad))
    match how:
        case "read":
            assert not remembered.read(bad)
        case "scrubbed":
            assert store.scrub(100).num_bad == 1
            assert store.flush(5)
        case "found":
            if spoil is flipped:
                (remembered.path / "index.db").unlink()
            store = remembered.open()
    assert store.find(bad.hash) is None and store.gone.why(bad.hash) is None
    assert remembered.quarantined() == ([] if spoil is Path.unlink else [bad.hash.hex()])
    assert all(remembered.read(block) for block in [*blocks, *left])
    if how != "found" or spoil is not flipped:
        remembered.open()
        assert head(remembered) == (600, left)
    assert remembered.put(bad) == [True] and remembered.read(bad)


def test_of_a_head_in_the_index_only_what_fits_is_believed(
    remembered: Opener, blocks: list[Block], checkpoints: list[Block], checkpoint_at: CheckpointAt
) -> None:
    stranger = checkpoint_at(range(1, 601), 300)
    remembered.put(stranger)
    remembered.close()
    listed = [checkpoints[3], stranger, blocks[1], checkpoints[0], checkpoints[3]]
    with closing(sqlite3.connect(remembered.path / "index.db")) as db, db:
        raw = b"".join(block.hash for block in listed)
        db.execute("UPDATE heads SET checkpoints = ?", (raw + b"??",))
    remembered.open()
    assert head(remembered) == (600, [checkpoints[0], checkpoints[3]])
    remembered.close()
    with closing(sqlite3.connect(remembered.path / "index.db")) as db, db:
        raw = b"".join(block.hash for block in (blocks[0], checkpoints[2], blocks[1]))
        db.execute("UPDATE heads SET chain = ?", (raw,))
    remembered.open()
    assert head(remembered) == (256, [checkpoints[0]])


def test_a_missing_block_takes_those_after_it_from_the_head(
    remembered: Opener, blocks: list[Block], checkpoints: list[Block]
) -> None:
    remembered.close()
    remembered.file(blocks[1]).unlink()
    remembered.open()
    assert head(remembered) == (256, checkpoints[:2])


def limited(opener: Opener, num_bytes: int) -> None:
    opener.limits = Limits(num_bytes, 0, None, None, free_bytes=lambda path: 1 << 60)
    opener.open()
    assert opener.store.flush(5)


def test_evicted_from_the_end_and_never_before_what_follows(
    remembered: Opener, spec: KVSpec, blocks: list[Block], checkpoints: list[Block]
) -> None:
    everything = [*blocks, *checkpoints]
    lengths = [len(everything)]
    while lengths[-1]:
        limited(remembered, remembered.store.disk_bytes - 1)
        present = {b.hash for b in everything if remembered.store.find(b.hash)}
        assert remembered.files() == {block_hash.hex() for block_hash in present}
        parents = {b.parent for b in everything if b.hash in present} - {spec.fingerprint}
        assert parents <= present
        agent = remembered.store.agents.get("a")
        assert (agent.owned() if agent else set()) == present
        with closing(sqlite3.connect(remembered.path / "index.db")) as db:
            rows = db.execute("SELECT chain, checkpoints FROM heads").fetchall()
        listed = b"".join(part for row in rows for part in row)
        assert {listed[at : at + 32] for at in range(0, len(listed), 32)} == present
        told = {c.hash: remembered.store.gone.why(c.hash) for c in checkpoints}
        assert set(told.values()) == {None}
        lengths.append(len(present))
    assert lengths == sorted(set(lengths), reverse=True) and len(lengths) > 4


def test_an_evicted_block_takes_checkpoints_that_need_it(
    opener: Opener, spec: KVSpec, checkpoint_at: CheckpointAt
) -> None:
    """Used later than the block, or it would go first."""
    store = opener.open()
    blocks = chain(spec.fingerprint, range(512))
    kept, needs = checkpoint_at(range(512), 256), checkpoint_at(range(512), 400)
    opener.put(*blocks)
    opener.put(kept, needs)
    store.record("a", spec.fingerprint, blocks, None, [kept, needs])
    opener.close()
    limited(opener, full_file_bytes(spec) + 20_000)
    assert opener.store.flush(5)
    assert opener.files() == names(blocks[0], kept)
    assert head(opener) == (256, [kept])
    assert opener.metric("evicted_blocks_total", reason="disk_bytes") == 2
    opener.open()
    assert head(opener) == (256, [kept])


# ── by hand ──────────────────────────────────────────────────────────────────────────────────────


def test_they_are_listed_and_verified_among_the_files(
    remembered: Opener, spec: KVSpec, blocks: list[Block], checkpoints: list[Block]
) -> None:
    other = Block.checkpoint_after(spec.fingerprint, token_bytes([5]))
    remembered.put(other)
    remembered.store.flush(5)
    state = StateDir.unlocked(remembered.path)
    seen, verified = look(state), verify(state, lambda done, of: None)
    assert (seen.blocks.count, seen.unowned.count, seen.agents[0].own.count) == (9, 1, 8)
    assert seen.blocks.nbytes == remembered.store.disk_bytes == verified.good.nbytes
    assert (verified.good.count, verified.new, verified.bad) == (9, 0, [])
    remembered.close()
    flipped(remembered.file(checkpoints[0]))
    remembered.file(checkpoints[1]).unlink()
    bad = dict(verify(state, lambda done, of: None).bad)
    assert bad == {
        remembered.file(checkpoints[0]): "checksum",
        remembered.file(checkpoints[1]): "missing",
    }


def test_collecting_and_rebuilding_keep_what_an_agent_has_in_mind(
    remembered: Opener, spec: KVSpec, blocks: list[Block], checkpoints: list[Block]
) -> None:
    other = Block.checkpoint_after(spec.fingerprint, token_bytes([5]))
    remembered.put(other)
    remembered.close()
    state = StateDir.open(remembered.path)
    try:
        assert upkeep.collect(state, dry_run=False).blocks.count == 1
        assert not remembered.file(other).exists()
        assert upkeep.rebuild(state).count == 8
    finally:
        state.close()
    remembered.open()
    assert head(remembered) == (600, checkpoints)
    assert remembered.files() == names(*blocks, *checkpoints)


def test_an_index_of_the_version_before_is_not_misread(remembered: Opener) -> None:
    remembered.close()
    (remembered.path / "VERSION").write_bytes(b"2\n")
    state = StateDir.open(remembered.path)
    try:
        with pytest.raises(StateDirError, match="version 2, this program knows 3"):
            look(state)
        index, catalog, agents, _ = recover(state, Metrics())
        index.close()
        assert len(catalog) == 0 and agents.all() == []
        assert (remembered.path / "set-aside-1" / "index.db").exists()
    finally:
        state.close()
        shutil.rmtree(remembered.path)
