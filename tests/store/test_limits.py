"""Limits: what goes when there is no room, what is not written, and that each block is once."""

import random
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from agent_memory.block import Block, BlockHash, Loss, chain
from agent_memory.kv_spec import KVSpec
from agent_memory.store.agents import Agents, Rank
from agent_memory.store.block_files import QUARANTINE_S, BlockFiles
from agent_memory.store.catalog import Catalog
from agent_memory.store.days import Day, Days
from agent_memory.store.eviction import Eviction
from agent_memory.store.format import BlockFile, full_file_bytes
from agent_memory.store.limits import Limits
from tests.store.conftest import Opener

ROOT = BlockHash(bytes(32))
MANY = 20_000


class Host:
    """What the system answers."""

    def __init__(self) -> None:
        self.date = 1000
        self.free = 1 << 40

    def today(self) -> int:
        return self.date

    def free_bytes(self, path: Path) -> int:
        return self.free


@pytest.fixture
def host(opener: Opener) -> Host:
    host = Host()
    limit(opener, host)
    return host


def limit(
    opener: Opener,
    host: Host,
    *,
    blocks: float = 1e6,
    min_free: int = 0,
    days: int | None = 90,
    daily: int | None = None,
) -> None:
    """`blocks`: how many full ones the disk may hold."""
    disk_bytes = int(blocks * full_file_bytes(opener.spec))
    opener.limits = Limits(disk_bytes, min_free, days, daily, host.today, host.free_bytes)


def talk(spec: KVSpec, name: int, num_tokens: int = 512) -> list[Block]:
    return chain(spec.fingerprint, [name] * num_tokens)


def remember(opener: Opener, agent_id: str | None, blocks: list[Block]) -> list[bool]:
    present = opener.put(*blocks, agent_id=agent_id)
    if agent_id is not None:
        opener.store.record(agent_id, opener.spec.fingerprint, blocks)
    return present


def found(opener: Opener, blocks: list[Block]) -> list[bool]:
    """By the catalog and by the files, which must agree."""
    assert opener.store.flush(5)
    opener.store.check()
    here = [opener.store.find(block.hash) is not None for block in blocks]
    assert here == [opener.file(block).exists() for block in blocks]
    return here


def test_the_end_of_what_was_used_longest_ago_goes_first(
    opener: Opener, host: Host, spec: KVSpec
) -> None:
    limit(opener, host, blocks=6.5)
    store = opener.open()
    talks = [talk(spec, n) for n in range(4)]
    for n in range(3):
        remember(opener, "abc"[n], talks[n])
    store.touch([block.hash for block in talks[0]])
    remember(opener, "d", talks[3][:1])
    assert [sum(found(opener, blocks)) for blocks in talks] == [2, 1, 2, 1]
    assert store.agents.known("b").heads[0].chain == tuple(talks[1][:1])
    remember(opener, "d", talks[3])
    assert found(opener, talks[1]) == [False, False]
    assert store.agents.get("b") is None
    assert opener.metric("evicted_blocks_total", reason="disk_bytes") == 2
    assert [store.gone.why(block.hash) for block in talks[1]] == [Loss.EVICTED] * 2
    assert store.disk_bytes <= opener.metric("disk_budget_bytes")
    opener.open()
    assert {agent.id for agent in opener.store.agents.all()} == {"a", "c", "d"}
    assert found(opener, [*talks[0], *talks[2], *talks[3]]) == [True] * 6


def test_anonymous_blocks_go_before_owned_ones_and_pinned_ones_last(
    opener: Opener, host: Host, spec: KVSpec
) -> None:
    limit(opener, host, blocks=4.5)
    store = opener.open()
    pinned, owned, nobodys, later = (talk(spec, n, 256) for n in range(4))
    remember(opener, "p", pinned)
    store.set_pinned("p", True)
    remember(opener, "o", owned)
    remember(opener, None, nobodys)
    remember(opener, "l", later)
    everybody = [*pinned, *owned, *nobodys, *later]
    assert found(opener, everybody) == [True] * 4
    remember(opener, "m", talk(spec, 5, 256))
    assert found(opener, everybody) == [True, True, False, True]
    remember(opener, "n", talk(spec, 6, 256))
    assert found(opener, everybody) == [True, False, False, True]
    for n in range(7, 10):
        remember(opener, "x", talk(spec, n, 256))
    assert found(opener, everybody) == [True, False, False, False]
    store.set_pinned("p", False)
    remember(opener, "y", talk(spec, 11, 256))
    assert found(opener, everybody) == [False] * 4


def test_pinned_ones_go_when_nothing_else_is_left(opener: Opener, host: Host, spec: KVSpec) -> None:
    limit(opener, host, blocks=1.5)
    opener.open()
    first, second = talk(spec, 1, 256), talk(spec, 2, 256)
    for agent_id, blocks in (("a", first), ("b", second)):
        remember(opener, agent_id, blocks)
        opener.store.set_pinned(agent_id, True)
    assert found(opener, first + second) == [False, True]


def test_a_block_larger_than_the_room_is_not_written(
    opener: Opener, host: Host, spec: KVSpec
) -> None:
    limit(opener, host, blocks=0.5)
    opener.open()
    with capture_logs() as logs:
        assert remember(opener, "a", talk(spec, 1)) == [False, False]
    assert opener.metric("writes_skipped_total", reason="disk_bytes") == 2
    assert [log["event"] for log in logs] == ["block_not_written"]
    assert opener.metric("blocks_written_total") == 0
    opener.store.check()


def test_limits_that_became_narrower_hold_from_the_start(
    opener: Opener, host: Host, spec: KVSpec
) -> None:
    opener.open()
    talks = [talk(spec, n) for n in range(5)]
    for n, blocks in enumerate(talks):
        remember(opener, str(n), blocks)
    limit(opener, host, blocks=4.5)
    opener.open()
    assert [sum(found(opener, blocks)) for blocks in talks] == [0, 0, 0, 2, 2]
    assert {agent.id for agent in opener.store.agents.all()} == {"3", "4"}
    opener.open()
    assert {agent.id for agent in opener.store.agents.all()} == {"3", "4"}


def test_below_the_floor_of_free_space_old_blocks_make_room(
    opener: Opener, host: Host, spec: KVSpec
) -> None:
    size = full_file_bytes(spec)
    limit(opener, host, min_free=10 * size)
    store = opener.open()
    for n in range(4):
        remember(opener, str(n), talk(spec, n, 256))
    assert store.flush(5)
    host.free = 9 * size
    assert remember(opener, "new", talk(spec, 9, 256)) == [False]  # the host never gains any
    assert opener.metric("evicted_blocks_total", reason="min_free_bytes") == 2
    assert opener.metric("writes_skipped_total", reason="min_free_bytes") == 1
    assert remember(opener, "new", talk(spec, 9, 256)) == [False]
    assert len(store.agents.all()) == 3  # deleting was of no use, so it has stopped
    host.free = 20 * size
    assert remember(opener, "new", talk(spec, 9, 256)) == [True]


def test_over_the_daily_budget_nothing_is_written_until_tomorrow(
    opener: Opener, host: Host, spec: KVSpec
) -> None:
    limit(opener, host, daily=int(2.5 * full_file_bytes(spec)))
    opener.open()
    blocks = talk(spec, 1, 700)
    assert remember(opener, "a", blocks) == [True, True, False]
    assert opener.metric("writes_skipped_total", reason="daily_write_bytes") == 1
    opener.open()  # a restart forgets nothing
    assert remember(opener, "a", blocks) == [True, True, False]
    host.date += 1
    assert remember(opener, "a", blocks) == [True, True, True]
    assert opener.metric("blocks_written_total") == 1


@pytest.mark.requirement("S-25")
def test_what_is_not_used_for_days_goes_and_what_is_pinned_stays(
    opener: Opener, host: Host, spec: KVSpec
) -> None:
    limit(opener, host, days=2)
    store = opener.open()
    old, used, pinned = (talk(spec, n) for n in range(3))
    for agent_id, blocks in (("old", old), ("used", used), ("pinned", pinned)):
        remember(opener, agent_id, blocks)
    store.set_pinned("pinned", True)
    for _ in range(2):
        host.date += 1
        assert all(found(opener, [*old, *used, *pinned]))
        opener.store.touch([block.hash for block in used])
        assert opener.store.flush(5)
    host.date += 1
    assert found(opener, [*old, *used, *pinned]) == [False, False, True, True, True, True]
    assert opener.metric("evicted_blocks_total", reason="max_age_days") == 2
    assert [opener.store.gone.why(block.hash) for block in old] == [Loss.EXPIRED] * 2
    assert {agent.id for agent in opener.store.agents.all()} == {"used", "pinned"}


def test_a_clock_that_jumps_expires_nothing(opener: Opener, host: Host, spec: KVSpec) -> None:
    limit(opener, host, days=3)
    opener.open()
    blocks = talk(spec, 1)
    remember(opener, "a", blocks)
    for date in (400_000, 1, 1000, 400_000, 1):
        host.date = date
        opener.open()
        assert found(opener, blocks) == [True, True]


def test_a_lower_age_holds_from_the_next_start(opener: Opener, host: Host, spec: KVSpec) -> None:
    limit(opener, host, days=None)
    opener.open()
    blocks = talk(spec, 1)
    remember(opener, "a", blocks)
    for _ in range(5):
        host.date += 1
        assert opener.store.flush(5)
    limit(opener, host, days=1)
    opener.open()
    assert found(opener, blocks) == [False, False]


def test_days_are_ordered_by_use_and_not_too_many() -> None:
    days = Days([Day(7, 30), Day(900_000, 10), Day(8, 20)])
    assert not days.begin(7, 50)
    assert (days.before(1), days.before(2), days.before(3)) == (20, 10, -1)
    days.wrote(5)
    days.wrote(6)
    assert days.bytes_today == 11
    assert days.begin(1, 60) and days.bytes_today == 0
    assert days.before(1) == 30
    many = Days([Day(n, n) for n in range(4001)])
    many.begin(1, 9999)
    assert len(many.rows()) == 2 and len(many.rows()) == 1


def test_a_full_block_is_written_once_in_its_life(opener: Opener, host: Host, spec: KVSpec) -> None:
    """Turn by turn, two agents and a restart: as many full blocks written as there are."""
    opener.open()
    written, tokens = 0.0, [5] * 100
    for turn in range(12):
        tokens += [turn] * 130
        for agent_id in "ab":
            blocks = chain(spec.fingerprint, tokens)
            new = [block for block in blocks if opener.store.find(block.hash) is None]
            opener.put(*new, agent_id=agent_id)
            opener.store.record(agent_id, spec.fingerprint, blocks)
        if turn == 6:
            written += opener.metric("blocks_written_total")
            opener.open()
    written += opener.metric("blocks_written_total")
    num_full = len(tokens) // 256
    num_tails = 12 - sum((100 + 130 * (turn + 1)) % 256 == 0 for turn in range(12))
    assert written == num_full + num_tails
    assert found(opener, chain(spec.fingerprint, tokens)) == [True] * (num_full + 1)


def test_an_eviction_the_index_could_not_record_is_done_later(
    opener: Opener, host: Host, spec: KVSpec
) -> None:
    limit(opener, host, blocks=2.5)
    store = opener.open()
    first, second, third = (talk(spec, n, 256) for n in range(3))
    remember(opener, "a", first)
    remember(opener, "b", second)
    assert store.flush(5)
    with closing(sqlite3.connect(opener.state.index)) as db:
        db.execute("BEGIN IMMEDIATE")
        assert remember(opener, "c", third) == [False]
        db.rollback()
    assert remember(opener, "c", third) == [True]
    assert found(opener, first + second + third) == [False, True, True]
    opener.open()
    assert found(opener, first + second + third) == [False, True, True]


def test_the_quarantine_is_bounded(
    opener: Opener, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    opener.open()
    for n in range(5):
        (opener.state.quarantine / str(n)).write_bytes(bytes(1000))
        time.sleep(0.01)
    files = BlockFiles(opener.state, opener.metrics)
    monkeypatch.setattr("agent_memory.store.block_files.QUARANTINE_BYTES", 2500)
    files.cap_quarantine()
    assert sorted(path.name for path in opener.state.quarantine.iterdir()) == ["3", "4"]
    later = time.time() + QUARANTINE_S + 1
    monkeypatch.setattr("agent_memory.store.block_files.time.time", lambda: later)
    files.cap_quarantine()
    assert not list(opener.state.quarantine.iterdir())


# ── the order of eviction, in memory ─────────────────────────────────────────────────────────────


def file_of(block: Block) -> BlockFile:
    return BlockFile(block, ROOT, 1000, bytes(16))


def test_evictions_go_by_rank_and_use_and_never_before_what_follows() -> None:
    rng = random.Random(8)
    catalog, agents = Catalog(), Agents()
    eviction = Eviction(catalog, agents)
    talks = {str(n): chain(ROOT, [n] * rng.choice([100, 256, 600, 1200])) for n in range(40)}
    for _ in range(400):
        agent_id, blocks = rng.choice(list(talks.items()))
        match rng.randrange(6):
            case 0 | 1 | 2:
                for block in blocks:
                    if catalog.file(block.hash) is None:
                        catalog.settle(catalog.expect(block, 1), file_of(block))
                if rng.random() < 0.6:
                    agents.record(agent_id, ROOT, tuple(blocks), 0.0)
            case 3:
                catalog.touch(block.hash for block in blocks)
            case 4 if agents.get(agent_id):
                agents.set_pinned(agent_id, rng.random() < 0.5)
            case 5:
                evict_and_compare(catalog, agents, eviction)
        catalog.check()
        agents.check()
    while len(catalog):
        evict_and_compare(catalog, agents, eviction)
    assert agents.all() == []


def evict_and_compare(catalog: Catalog, agents: Agents, eviction: Eviction) -> None:
    leaves = catalog.leaves()
    keys = {h: (agents.rank(h), catalog.used_as_leaf(h)) for h in leaves}
    gone = eviction.make_room(1)
    assert [file.block.hash for file in gone] == sorted(leaves, key=lambda h: keys[h])[:1]
    assert all(not agents.owns(file.block.hash) for file in gone)


def test_ranks() -> None:
    agents = Agents()
    blocks = chain(ROOT, [1] * 300)
    assert agents.rank(blocks[0].hash) is Rank.ANONYMOUS
    agents.record("a", ROOT, tuple(blocks), 0.0)
    agents.fork("a", "b", None, 0.0)
    assert agents.rank(blocks[0].hash) is Rank.OWNED
    agents.set_pinned("b", True)
    assert agents.rank(blocks[1].hash) is Rank.PINNED
    agents.remove("b")
    assert agents.rank(blocks[1].hash) is Rank.OWNED


def test_one_eviction_of_twenty_thousand_takes_less_than_a_millisecond() -> None:
    catalog, agents = Catalog(), Agents()
    for n in range(MANY // 100):
        blocks = chain(ROOT, [n] * 100 * 256)
        for used, block in enumerate(blocks):
            catalog.load(file_of(block), 100 * n + used)
        if n % 4:
            agents.record(f"agent {n}", ROOT, tuple(blocks), 0.0)
    eviction = Eviction(catalog, agents)
    began = time.process_time()
    gone = [eviction.make_room(1000) for _ in range(MANY // 2)]
    seconds = time.process_time() - began
    assert all(len(files) == 1 for files in gone)
    assert seconds / len(gone) < 1e-3
