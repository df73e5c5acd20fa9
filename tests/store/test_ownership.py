"""What agents own, on disk: what forks share, and what goes with whom."""

import random
import sqlite3
import time
from contextlib import closing

import pytest

from agent_memory.block import Block, BlockHash, chain, root_of
from agent_memory.errors import Conflict
from agent_memory.kv_spec import KVSpec
from agent_memory.store import upkeep, writer
from agent_memory.store.state_dir import StateDir
from agent_memory.tenants import inside
from tests.marks import first_is_fast
from tests.store.conftest import Opener, names


def remember(opener: Opener, agent_id: str, blocks: list[Block]) -> None:
    opener.put(*blocks, agent_id=agent_id)
    opener.store.record(agent_id, opener.spec.fingerprint, blocks)


@pytest.mark.requirement("S-08", "S-09")
def test_agents_of_two_tenants_share_nothing(opener: Opener, spec: KVSpec) -> None:
    """Of the same tokens each has blocks of its own, also after a restart and a rebuild."""
    store = opener.open()
    chains = {
        inside(name, "ann"): chain(root_of(spec.fingerprint, name), range(600))
        for name in (None, "acme", "zoo")
    }
    for agent_id, blocks in chains.items():
        remember(opener, agent_id, blocks)
    assert len(opener.files()) == 9
    for agent_id in chains:
        store.rewind(agent_id, 599)
        store.fork(agent_id, agent_id + "-2")
    for prepare in (opener.close, lambda: upkeep.rebuild(StateDir.unlocked(opener.path))):
        opener.close()
        prepare()
        opener.open()
        assert len(opener.store.agents.all()) == 6
        for agent_id, blocks in chains.items():
            for name in (agent_id, agent_id + "-2"):
                assert opener.store.agents.known(name).heads[0].chain == tuple(blocks)
    with pytest.raises(AssertionError):
        opener.store.record("acme/ann", spec.fingerprint, chains["ann"])
    with pytest.raises(AssertionError):
        opener.store.fork("acme/ann", "zoo/eve")
    opener.store.remove("acme/ann")
    assert opener.store.remove("acme/ann-2") == {block.hash for block in chains["acme/ann"]}
    assert opener.files() == names(*chains["ann"], *chains["zoo/ann"])


def test_a_fork_copies_nothing_and_outlives_what_it_was_made_from(
    opener: Opener, blocks: list[Block]
) -> None:
    store = opener.open()
    remember(opener, "a", blocks)
    written = opener.metric("bytes_written_total")
    fork = store.fork("a", "b")
    assert (fork.id, fork.heads[0].chain, fork.bytes_written) == ("b", tuple(blocks), 0)
    assert store.remove("a") == set()
    assert opener.files() == names(*blocks)
    assert opener.metric("bytes_written_total") == written
    opener.open()
    assert [agent.id for agent in opener.store.agents.all()] == ["b"]
    assert all(opener.read(block) for block in blocks)


@pytest.mark.requirement("S-24")
def test_a_removed_agent_leaves_nothing_that_was_its_alone(
    opener: Opener, spec: KVSpec, blocks: list[Block]
) -> None:
    store = opener.open()
    other = chain(spec.fingerprint, [*range(256), 7, 7])
    remember(opener, "a", blocks)
    remember(opener, "Agnes", other)
    opener.store.set_pinned("Agnes", True)
    assert store.remove("a") == {block.hash for block in blocks[1:]}
    assert [store.find(block.hash) for block in blocks] == [blocks[0], None, None]
    assert opener.files() == names(*other)
    assert store.agents.get("a") is None
    store.check()
    assert store.remove("Agnes") == {block.hash for block in other}
    assert opener.files() == set()
    traces = [b"Agnes", blocks[2].hash, blocks[2].tokens[:200], other[1].hash]
    assert no_trace(opener, traces)
    opener.open()
    assert opener.store.agents.all() == [] and opener.store.disk_bytes == 0
    assert no_trace(opener, traces)


def no_trace(opener: Opener, traces: list[bytes]) -> bool:
    raw = b"".join(path.read_bytes() for path in opener.path.rglob("*") if path.is_file())
    assert b"blocks" in raw  # the index was read at all
    return not any(trace in raw for trace in traces)


@pytest.mark.requirement("S-24")
def test_what_was_refused_of_a_removed_agent_goes_too(opener: Opener, blocks: list[Block]) -> None:
    """A damaged file in quarantine tells what was said as well as a good one."""
    store = opener.open()
    remember(opener, "Agnes", blocks)
    remember(opener, "Bert", blocks[:1])
    for block in blocks[:2]:
        raw = bytearray(opener.file(block).read_bytes())
        raw[-1] ^= 1
        opener.file(block).write_bytes(raw)
        assert not opener.read(block)
    assert len(opener.quarantined()) == 2
    store.remove("Agnes")
    assert store.saved(5)
    assert opener.quarantined() == [blocks[0].hash.hex()]
    assert no_trace(opener, [b"Agnes", blocks[1].tokens[:200]])


def test_traces_go_even_if_somebody_was_reading_the_index(
    opener: Opener, blocks: list[Block]
) -> None:
    store = opener.open()
    remember(opener, "Agnes", blocks)
    assert store.flush(5)
    with closing(sqlite3.connect(opener.state.index)) as db:
        db.execute("BEGIN")
        db.execute("SELECT * FROM blocks").fetchone()
        store.remove("Agnes")
        assert store.flush(5)
        db.rollback()
    assert store.flush(5)
    assert no_trace(opener, [b"Agnes", blocks[0].hash])


@pytest.mark.requirement("S-24")
def test_a_removal_that_could_not_be_written_is_not_done_and_tried_again_soon(
    monkeypatch: pytest.MonkeyPatch, opener: Opener, blocks: list[Block]
) -> None:
    monkeypatch.setattr(writer, "IDLE_S", 0.05)
    store = opener.open()
    remember(opener, "Agnes", blocks)
    assert store.saved(5)
    time.sleep(0.5)  # there is nothing to do, and the writer rests
    with closing(sqlite3.connect(opener.state.index)) as db:
        db.execute("BEGIN IMMEDIATE")
        store.remove("Agnes")
        assert not store.saved(0.5)
        db.rollback()
    deadline = time.monotonic() + 10
    while store._writer.owes and time.monotonic() < deadline:
        time.sleep(0.05)  # nobody asks the store anything
    assert no_trace(opener, [b"Agnes", blocks[0].hash])


def test_what_follows_anonymously_is_kept(
    opener: Opener, spec: KVSpec, blocks: list[Block]
) -> None:
    store = opener.open()
    anonymous = chain(spec.fingerprint, [*range(512), 8])
    remember(opener, "a", blocks)
    opener.put(anonymous[-1])
    assert store.remove("a") == {blocks[2].hash}
    assert opener.files() == names(*anonymous)


def test_what_is_about_to_be_written_goes_too(opener: Opener, blocks: list[Block]) -> None:
    store, told = opener.open(), list[bool]()
    for block in blocks:
        store.put(block, opener.payload_of(block), opener.spec, lambda _, ok: told.append(ok), "a")
    store.record("a", opener.spec.fingerprint, blocks)
    assert store.remove("a") == {block.hash for block in blocks}
    assert opener.files() == set()
    assert len(told) == 3 and store.disk_bytes == 0
    store.check()


def test_a_rewind_writes_nothing_and_lets_go_of_the_rest(
    opener: Opener, spec: KVSpec, blocks: list[Block]
) -> None:
    store = opener.open()
    opener.put(*blocks)
    store.record("a", spec.fingerprint, blocks, turn=(10, 600))
    head = store.rewind("a", 300).heads[0]
    assert (head.num_tokens, head.chain, head.turns) == (300, tuple(blocks[:2]), ())
    assert opener.files() == names(*blocks[:2])
    with pytest.raises(Conflict):
        store.rewind("a", 301)
    opener.open()
    again = opener.store.agents.known("a").heads[0]
    assert (again.num_tokens, again.chain, again.id) == (300, tuple(blocks[:2]), head.id)
    assert opener.metric("blocks_written_total") == 0


def test_the_blocks_of_a_head_pushed_out_go(opener: Opener, spec: KVSpec) -> None:
    store = opener.open()
    talks = [chain(spec.fingerprint, [*range(256), *[n] * 300]) for n in range(9)]
    for talk in talks[:8]:
        remember(opener, "a", talk)
    opener.put(*talks[8])
    gone = store.record("a", spec.fingerprint, talks[8])
    assert set(gone) == set(talks[0][1:])
    assert opener.files() == names(*(block for talk in talks[1:] for block in talk))
    store.check()


def test_agents_facts_come_back(opener: Opener, spec: KVSpec, blocks: list[Block]) -> None:
    store = opener.open()
    remember(opener, "a", blocks[:2])
    opener.put(*blocks, agent_id="a")
    store.record("a", spec.fingerprint, blocks, turn=(20, 600))
    opener.put(*blocks, agent_id="b")
    store.record("b", spec.fingerprint, blocks)
    assert store.set_pinned("a", True).pinned
    assert store.flush(5)
    before = store.agents.all()
    written = {agent.id: agent.bytes_written for agent in before}
    assert written == {"a": store.disk_bytes, "b": 0}
    opener.open()
    assert opener.store.agents.all() == before
    assert not opener.store.set_pinned("a", False).pinned
    opener.open()
    assert not opener.store.agents.known("a").pinned


def test_an_imported_head(opener: Opener, spec: KVSpec, blocks: list[Block]) -> None:
    store = opener.open()
    opener.put(*blocks)
    store.adopt("a", spec.fingerprint, blocks, [(5, 8), (20, 30)], 550)
    opener.open()
    head = opener.store.agents.known("a").heads[0]
    assert (head.num_tokens, head.turns, head.chain) == (550, ((5, 8), (20, 30)), tuple(blocks))


def test_what_agents_did_while_the_index_could_not_be_written_is_done_later(
    opener: Opener, spec: KVSpec, blocks: list[Block]
) -> None:
    store = opener.open()
    remember(opener, "a", blocks)
    remember(opener, "b", chain(spec.fingerprint, [1, 2]))
    assert store.flush(5)
    with closing(sqlite3.connect(opener.state.index)) as db:
        db.execute("BEGIN IMMEDIATE")
        store.fork("a", "c")
        store.remove("b")
        store.rewind("a", 10)
        assert store.flush(5)
        store.rewind("c", 300)
        assert store.flush(5)
        db.rollback()
    assert opener.metric("persist_errors_total", errno="SQLITE_BUSY") == 2
    store.touch([blocks[0].hash])
    assert opener.files() == names(*blocks[:2])
    opener.open()
    ends = {agent.id: agent.heads[0].num_tokens for agent in opener.store.agents.all()}
    assert ends == {"a": 10, "c": 300}


def test_a_file_that_a_crash_kept_goes_at_the_next_start(
    opener: Opener, blocks: list[Block]
) -> None:
    store = opener.open()
    remember(opener, "a", blocks)
    kept = opener.file(blocks[2]).read_bytes()
    store.rewind("a", 512)
    opener.close()
    opener.file(blocks[2]).write_bytes(kept)
    with closing(sqlite3.connect(opener.path / "index.db")) as db, db:
        db.execute("INSERT OR IGNORE INTO doomed VALUES (?)", (blocks[2].hash,))
    opener.open()
    assert opener.store.find(blocks[2].hash) is None
    assert opener.files() == names(*blocks[:2])
    assert opener.put(blocks[2]) == [True]
    opener.open()
    assert opener.read(blocks[2])


@pytest.mark.parametrize("seed", first_is_fast(*range(2)))
def test_random_lives(opener: Opener, spec: KVSpec, seed: int) -> None:
    """Of all agents' blocks just those are on disk that somebody owns."""
    rng = random.Random(seed)
    opener.open()
    for _ in range(120):
        store = opener.store
        agent_id = rng.choice("abc")
        known = store.agents.get(agent_id)
        match rng.randrange(7) if known else 6:
            case 0:
                store.remove(agent_id)
            case 1 if known:
                store.rewind(agent_id, rng.randrange(1, known.heads[0].num_tokens + 1))
            case 2 if store.agents.get("d") is None:
                store.fork(agent_id, "d")
            case 3 if store.agents.get("d"):
                store.remove("d")
            case 4:
                opener.open()
            case _:
                end = rng.choice([3, 200, 300, 520])
                remember(opener, agent_id, chain(spec.fingerprint, [*range(end), rng.randrange(4)]))
        opener.store.check()
        owned: set[BlockHash] = {
            block.hash
            for agent in opener.store.agents.all()
            for head in agent.heads
            for block in head.chain
        }
        assert opener.files() == {block_hash.hex() for block_hash in owned}
