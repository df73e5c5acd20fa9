"""Verbs where the engine thread has a say: who is computing meanwhile, and what is in RAM."""

import io
import sqlite3
from contextlib import aclosing, closing
from pathlib import Path

import pytest

from agent_memory.engine import agent_verbs
from agent_memory.engine.agent_views import HeadView
from agent_memory.engine.archive import ArchiveReader
from agent_memory.engine.engine import Engine
from agent_memory.errors import Conflict, NotFound, Unavailable
from agent_memory.request import Finished, GenerateRequest, Started
from tests.engine.test_engine import FACTS, GREEDY, ask, running, tokenized


async def settled(engine: Engine, agent_id: str) -> HeadView:
    """Its newest head, when everything has been committed and written."""
    await engine._on_thread(lambda: None)
    assert engine._store.flush(10)
    await engine._on_thread(lambda: None)
    return engine.agents.one(agent_id).heads[0]


async def test_who_goes_on_from_an_agent_that_is_removed_keeps_what_they_share(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as engine:
        prompt = await tokenized(engine, FACTS)
        await ask(engine, prompt, "ann")
        shared = len((await settled(engine, "ann")).chain)
        assert shared >= 2
        request = GenerateRequest("ben-1", "ben", (*prompt, *range(100, 110)), GREEDY, 60)
        async with aclosing(engine.models.default.generate(request)) as events:
            async for event in events:
                if isinstance(event, Started):
                    assert event.cached_tokens == len(prompt)
                    await engine.agents.remove("ann")
                    assert engine._store.agents.get("ann") is None
                last = event
        assert isinstance(last, Finished)
        head = await settled(engine, "ben")
        assert head.on_disk == head.num_tokens >= len(prompt) + 10
        engine._store.check()
        again = await ask(engine, request.prompt, "ben")
        assert again.cached == len(request.prompt) - 1


async def test_an_agent_that_is_being_answered_stays(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        await ask(engine, FACTS, "ann")
        request = GenerateRequest("ann-2", "ann", await tokenized(engine, "Hello!"), GREEDY, 60)
        async with aclosing(engine.models.default.generate(request)) as events:
            await anext(events)
            with pytest.raises(Conflict, match="being answered"):
                await engine.agents.remove("ann")
        await engine._on_thread(lambda: None)
        removed: list[str] = []
        engine.agents.on_removed.append(removed.append)
        await engine.agents.remove("ann")
        assert removed == ["ann"]
        with pytest.raises(NotFound):
            await engine.agents.remove("ann")
        assert removed == ["ann"]


async def test_a_removal_is_answered_when_it_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then a crash would bring the agent back.  In RAM it is forgotten at once."""
    monkeypatch.setattr(agent_verbs, "FLUSH_S", 1.0)
    async with running(tmp_path) as engine:
        await ask(engine, FACTS, "ann")
        await settled(engine, "ann")
        removed: list[str] = []
        engine.agents.on_removed.append(removed.append)
        with closing(sqlite3.connect(tmp_path / "state" / "index.db")) as db:
            db.execute("BEGIN IMMEDIATE")
            with pytest.raises(Unavailable, match="not deleted yet"):
                await engine.agents.remove("ann")
            db.rollback()
        assert removed == ["ann"]
        assert engine._store.saved(10)


async def test_warming_brings_what_is_on_disk_to_ram(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        await ask(engine, FACTS, "ann")
        head = await settled(engine, "ann")
        await engine._on_thread(engine._residents.pool.clear)
        assert engine.agents.one("ann").heads[0].in_memory == 0
        assert (await engine.agents.warm("ann")).heads[0].in_memory == head.num_tokens
        assert (await engine.agents.warm("ann")).heads[0].in_memory == head.num_tokens
        await engine._on_thread(engine._residents.pool.check)
        again = await ask(engine, FACTS, "ann")
        assert again.started.from_memory == again.cached > 500


async def test_a_pool_too_small_is_warmed_as_far_as_it_goes(tmp_path: Path) -> None:
    async with running(tmp_path, pool_bytes=3 << 20) as engine:
        block_bytes = 256 * int(str(engine.models.default.known.kv["bytes_per_token"]))
        await ask(engine, FACTS, "ann")
        head = await settled(engine, "ann")
        await engine._on_thread(engine._residents.pool.clear)
        engine._residents.pool.budget_bytes = 2 * block_bytes
        assert len(head.chain) > 2
        assert (await engine.agents.warm("ann")).heads[0].in_memory == 512


async def test_what_is_in_ram_only_is_exported(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        await ask(engine, FACTS, "ann")
        head = await settled(engine, "ann")
        for block in head.chain:
            engine._store._catalog.forget(block.hash)
        export = await engine.transfer.export("ann")
        raw = b"".join([chunk async for chunk in export.chunks()])
        export.close()
        assert len(raw) == export.num_bytes
        reader = ArchiveReader(io.BytesIO(raw))
        assert reader.manifest.heads[0].num_tokens == head.num_tokens
        for expected in reader.manifest.blocks:
            reader.block(expected)
        reader.end()
        await engine._on_thread(engine._residents.pool.clear)
        with pytest.raises(Conflict) as caught:
            await engine.transfer.export("ann")
        assert caught.value.code == "incomplete"
