"""Turns that were cut short: what they had written is their agent's, and goes with it.

A store that is closed with blocks put and no head recorded is as one that was killed then.
"""

import sqlite3
from contextlib import closing

import pytest

from agent_memory.block import Block, chain
from agent_memory.kv_spec import KVSpec
from agent_memory.store import upkeep
from agent_memory.store.look import look
from agent_memory.store.state_dir import StateDir
from tests.store.conftest import CheckpointAt, Opener, names


@pytest.fixture
def blocks(spec: KVSpec) -> list[Block]:
    return chain(spec.fingerprint, range(1100))


def begin(opener: Opener, blocks: list[Block]) -> None:
    """An agent has two blocks in mind, and is killed when there are two more."""
    store = opener.open()
    opener.put(*blocks[:2], agent_id="Agnes")
    store.record("Agnes", opener.spec.fingerprint, blocks[:2], (10, 512))
    opener.put(*blocks[2:4], agent_id="Agnes")


def written_for(opener: Opener) -> int:
    assert opener.store.flush(5)
    with closing(sqlite3.connect(opener.path / "index.db")) as db:
        [num_rows] = db.execute("SELECT count(*) FROM written_for").fetchone()
    return int(num_rows)


@pytest.mark.requirement("S-24")
def test_a_turn_that_was_cut_short_goes_with_its_agent(opener: Opener, blocks: list[Block]) -> None:
    begin(opener, blocks)
    assert written_for(opener) == 2
    store = opener.open()
    [head] = store.agents.known("Agnes").heads
    assert (head.chain, head.turns) == (tuple(blocks[:4]), ((10, 512),))
    assert store.agents.known("Agnes").bytes_written == store.disk_bytes
    assert written_for(opener) == 0
    store = opener.open()
    assert store.agents.known("Agnes").heads == (head,)
    assert store.remove("Agnes") == {block.hash for block in blocks[:4]}
    assert store.saved(5) and opener.files() == set()
    raw = b"".join(path.read_bytes() for path in opener.path.rglob("*") if path.is_file())
    assert not any(trace in raw for trace in (b"Agnes", blocks[3].hash, blocks[3].tokens[:200]))


@pytest.mark.requirement("S-24")
def test_so_does_an_agents_first_turn(opener: Opener, blocks: list[Block]) -> None:
    opener.open()
    opener.put(*blocks[:3], agent_id="acme/ann")  # of another's chain: it can be in no head
    opener.put(*blocks[:1], agent_id="ann")
    opener.put(*blocks[3:4], agent_id="ann")
    store = opener.open()
    [ann] = store.agents.all()
    assert (ann.id, ann.heads[0].chain) == ("ann", tuple(blocks[:4]))
    assert ann.bytes_written == store.bytes_of([blocks[3].hash])
    store.remove("ann")
    assert opener.files() == set()


def test_turns_that_went_side_by_side_are_heads_each(
    opener: Opener, spec: KVSpec, blocks: list[Block]
) -> None:
    begin(opener, blocks)
    other = chain(spec.fingerprint, [*range(256), *[7] * 400])
    opener.put(*other[1:], agent_id="Agnes")
    store = opener.open()
    heads = store.agents.known("Agnes").heads
    assert [head.chain for head in heads] == [tuple(other), tuple(blocks[:4])]
    store.remove("Agnes")
    assert opener.files() == set()


def test_what_can_be_in_no_head_is_deleted(
    opener: Opener, spec: KVSpec, blocks: list[Block], checkpoint_at: CheckpointAt
) -> None:
    """A beginning that was passed, a checkpoint beyond the end, a block after one that is lost."""
    store = opener.open()
    points = [checkpoint_at(range(1100), end) for end in (256, 500, 600, 1090)]
    opener.put(*blocks[:2], points[0], agent_id="a")
    store.record("a", spec.fingerprint, blocks[:2], checkpoints=points[:1])
    passed = chain(spec.fingerprint, range(700))[-1]
    lost = chain(spec.fingerprint, [5] * 600)
    opener.put(passed, *blocks[2:4], *points[1:], *lost, agent_id="a")
    opener.close()
    opener.file(lost[0]).unlink()
    store = opener.open()
    [head] = store.agents.known("a").heads
    assert (head.chain, head.checkpoints) == (tuple(blocks[:4]), tuple(points[:3]))
    assert opener.files() == names(*blocks[:4], *points[:3])
    opener.open()
    assert opener.files() == names(*blocks[:4], *points[:3])


def test_what_others_have_of_it_stays(opener: Opener, spec: KVSpec, blocks: list[Block]) -> None:
    begin(opener, blocks)
    opener.store.record("b", spec.fingerprint, blocks[:3])
    anonymous = chain(spec.fingerprint, [*range(1024), 8])[-1]
    opener.put(anonymous)
    store = opener.open()
    assert store.remove("Agnes") == set()
    assert opener.files() == names(*blocks[:4], anonymous)


def test_nothing_is_noted_of_what_a_head_holds_or_what_is_gone(
    opener: Opener, spec: KVSpec, blocks: list[Block]
) -> None:
    begin(opener, blocks)
    store = opener.store
    opener.put(*blocks[:4], agent_id="b")  # is there already
    opener.put(*blocks[4:], agent_id="b")
    assert written_for(opener) == 3
    store.record("b", spec.fingerprint, blocks)
    assert written_for(opener) == 2
    store.record("Agnes", spec.fingerprint, blocks[:4])
    assert written_for(opener) == 0
    passed = chain(spec.fingerprint, range(700))[-1]
    opener.put(passed, agent_id="b")
    assert written_for(opener) == 1
    store.record("b", spec.fingerprint, blocks, passed=[passed])
    assert written_for(opener) == 0


@pytest.mark.requirement("S-24")
def test_a_rebuild_takes_over_whose_it_is(opener: Opener, blocks: list[Block]) -> None:
    begin(opener, blocks)
    opener.close()
    state = StateDir.unlocked(opener.path)
    [seen] = look(state).agents
    assert (seen.agent.id, seen.own.count, look(state).unowned.count) == ("Agnes", 4, 0)
    upkeep.rebuild(state)
    store = opener.open()
    assert store.remove("Agnes") == {block.hash for block in blocks[:4]}


def test_an_index_of_before_there_was_such_a_table(opener: Opener, blocks: list[Block]) -> None:
    begin(opener, blocks)
    opener.close()
    for prepare in (look, upkeep.rebuild):
        with closing(sqlite3.connect(opener.path / "index.db")) as db, db:
            db.execute("DROP TABLE IF EXISTS written_for")
        prepare(StateDir.unlocked(opener.path))
    store = opener.open()
    assert store.agents.known("Agnes").heads[0].chain == tuple(blocks[:2])
    assert written_for(opener) == 0
