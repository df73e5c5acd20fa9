"""Who is sent back to wait, goes away or fails: what was kept of it is its agent's."""

from contextlib import aclosing
from pathlib import Path

import pytest

from agent_memory.engine.engine import Engine
from agent_memory.errors import NotFound
from agent_memory.request import Delta, Failed, GenerateRequest
from tests.engine.test_engine import ENDLESS, FACTS, GREEDY, running, steps_of, tokenized


def send_back(engine: Engine, *, then_cancel: bool = False) -> None:
    """Engine thread."""
    steps = steps_of(engine)
    for seq in list(steps.scheduler.admitted):
        steps._preempt(seq)
        if then_cancel:
            steps.cancel(seq.request.id)


async def written(engine: Engine) -> None:
    await engine._on_thread(lambda: None)
    assert engine._store.flush(10)
    await engine._on_thread(lambda: None)


@pytest.mark.requirement("S-24")
async def test_what_was_kept_on_the_way_goes_with_the_agent(tmp_path: Path) -> None:
    """A block that was full in part when it was sent back is of no use once it has gone on."""
    async with running(tmp_path) as engine:
        prompt = await tokenized(engine, FACTS + ENDLESS)
        request = GenerateRequest("ann-1", "ann", prompt, GREEDY, 40)
        sent_back = 0
        async with aclosing(engine.models.default.generate(request)) as events:
            async for event in events:
                if isinstance(event, Delta) and event.num_tokens in (5, 20):
                    await engine._on_thread(lambda: send_back(engine))
                    sent_back += 1
        assert sent_back == 2
        await written(engine)
        assert engine.agents.one("ann").heads[0].num_blocks >= 3
        await engine.agents.remove("ann")
        assert engine._store.disk_bytes == 0 and len(engine._residents.pool) == 0


@pytest.mark.requirement("B-25")
async def test_who_goes_away_while_it_waits_again_is_remembered(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        prompt = await tokenized(engine, FACTS + ENDLESS)
        request = GenerateRequest("ann-1", "ann", prompt, GREEDY, None)
        async with aclosing(engine.models.default.generate(request)) as events:
            async for event in events:
                if isinstance(event, Delta) and event.num_tokens > 5:
                    await engine._on_thread(lambda: send_back(engine, then_cancel=True))
                    break
        await written(engine)
        [head] = engine.agents.one("ann").heads
        assert head.on_disk == head.num_tokens > len(prompt)
        assert [(turn.start, turn.prompt_end, turn.end) for turn in head.turns] == [
            (0, len(prompt), head.num_tokens)
        ]
        await engine.agents.remove("ann")
        assert engine._store.disk_bytes == 0
        with pytest.raises(NotFound):
            engine.agents.one("ann")


@pytest.mark.requirement("S-24")
async def test_what_was_kept_of_a_request_that_fails_goes_with_the_agent(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        prompt = await tokenized(engine, FACTS + ENDLESS)

        def fail() -> None:
            for seq in list(steps_of(engine).scheduler):
                steps_of(engine)._fail(seq)

        request = GenerateRequest("ann-1", "ann", prompt, GREEDY, None)
        async with aclosing(engine.models.default.generate(request)) as events:
            async for event in events:
                if isinstance(event, Delta):
                    await engine._on_thread(fail)
                last = event
        assert isinstance(last, Failed)
        await written(engine)
        assert engine._store.disk_bytes > 0
        await engine.agents.remove("ann")
        assert engine._store.disk_bytes == 0 and len(engine._residents.pool) == 0
