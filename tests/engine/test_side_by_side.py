"""Sequences beside each other in the real engine: nobody waits for another's end."""

import asyncio
from contextlib import aclosing
from pathlib import Path

import mlx.core as mx
import pytest

from agent_memory.model.runner import Job, Runner
from agent_memory.request import Delta, Failed, Finished, FinishReason, GenerateRequest
from tests.conftest import ordinary_text
from tests.engine.test_engine import ENDLESS, FACTS, GREEDY, ask, running, steps_of, tokenized

STEP_TOKENS = 64


@pytest.mark.requirement("B-23")
async def test_who_is_answered_goes_on_while_a_long_prompt_is_computed(tmp_path: Path) -> None:
    long = ordinary_text()[:6000]
    async with running(tmp_path / "alone", step_tokens=STEP_TOKENS) as engine:
        alone = [(await ask(engine, p, f"a{i}", 100)).text for i, p in enumerate((ENDLESS, long))]
    async with running(tmp_path / "beside", step_tokens=STEP_TOKENS) as engine:
        prompt, told, num_told = await tokenized(engine, ENDLESS), list[str](), [0]
        begun = asyncio.Event()

        async def answered() -> None:
            request = GenerateRequest("first", "ann", prompt, GREEDY, 100)
            async with aclosing(engine.models.default.generate(request)) as events:
                async for event in events:
                    if isinstance(event, Delta):
                        told.append(event.text)
                        num_told[0] = event.num_tokens
                        begun.set()

        first = asyncio.create_task(answered())
        await begun.wait()
        tokens = await tokenized(engine, long)
        before, said = num_told[0], list[str]()
        request = GenerateRequest("second", "ben", tokens, GREEDY, 100)
        async with aclosing(engine.models.default.generate(request)) as events:
            async for event in events:
                if isinstance(event, Delta):
                    said.append(event.text)
                    if len(said) == 1:  # a token of the first for each step of the prompt
                        num_steps = len(tokens) // STEP_TOKENS
                        assert num_steps > 20 and num_told[0] - before >= num_steps - 5
        await first
        assert ["".join(told), "".join(said)] == alone


@pytest.mark.requirement("B-24")
@pytest.mark.slow
async def test_who_asks_little_does_not_wait_for_who_asks_much(tmp_path: Path) -> None:
    async with running(tmp_path / "alone") as engine:
        alone = [(await ask(engine, ENDLESS, "slow", 300)).text, (await ask(engine, FACTS)).text]
    async with running(tmp_path / "beside") as engine:
        under_way = asyncio.Event()
        slow = asyncio.create_task(ask(engine, ENDLESS, "slow", 300, under_way=under_way))
        await under_way.wait()
        quick = await ask(engine, FACTS)
        assert not slow.done()
        assert [(await slow).text, quick.text] == alone


@pytest.mark.requirement("B-27")
async def test_one_agent_twice_at_once(tmp_path: Path) -> None:
    """Two conversations of one name, and one of them twice: each is answered as alone."""
    prompts = [FACTS, ENDLESS, FACTS]
    async with running(tmp_path / "alone") as engine:
        alone = [(await ask(engine, prompt)).text for prompt in prompts]
    async with running(tmp_path / "at-once") as engine:
        answers = await asyncio.gather(*(ask(engine, prompt) for prompt in prompts))
        assert [answer.text for answer in answers] == alone
        await engine._on_thread(engine._residents.pool.check)
        assert engine._store.flush(10)
        engine._store.check()
        assert len(engine.agents.one("ann").heads) == 2
        for prompt, text in zip(prompts, alone, strict=True):
            again = await ask(engine, prompt)
            assert (again.cached, again.text) == (again.started.prompt_tokens - 1, text)


@pytest.mark.requirement("B-15")
async def test_what_has_left_ram_comes_from_disk(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        cold = await ask(engine, FACTS)
        await engine._on_thread(lambda: None)
        assert engine._store.flush(10)
        assert await engine._on_thread(engine._residents.pool.clear) == 0
        warm = await ask(engine, FACTS)
        assert warm.started.from_disk == cold.started.prompt_tokens - 1
        assert warm.finished == cold.finished and warm.text == cold.text


@pytest.mark.requirement("B-21")
async def test_when_all_agents_are_removed_the_pool_is_empty(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        for n in range(3):
            answer = await ask(engine, FACTS + f" And {n}.", f"agent-{n}")
            assert isinstance(answer.finished, Finished)
        await engine._on_thread(lambda: None)
        assert engine._residents.pool.num_bytes > 0
        for n in range(3):
            await engine.agents.remove(f"agent-{n}")
        await engine._on_thread(engine._residents.pool.check)
        assert engine._residents.pool.num_bytes == 0 and len(engine._residents.pool) == 0
        assert engine._store.flush(10)
        assert not list((tmp_path / "state" / "blocks").rglob("*.safetensors"))


@pytest.mark.requirement("F-22")
async def test_however_many_are_at_fault_the_others_never_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each brings a step down that the same answer is in."""
    async with running(tmp_path) as engine:
        forward, prompt = Runner.forward, await tokenized(engine, "Hello!")

        def faulty(runner: Runner, jobs: list[Job]) -> mx.array:
            kvs = [job.kv for job in jobs]
            for seq in steps_of(engine).scheduler.admitted:
                assert not (seq.request.agent == "eve" and seq.num_generated and seq.kv in kvs)
            return forward(runner, jobs)

        monkeypatch.setattr(Runner, "forward", faulty)
        begun = asyncio.Event()
        patient = asyncio.create_task(ask(engine, ENDLESS, "ann", 400, under_way=begun))
        await begun.wait()
        for n in range(4):
            request = GenerateRequest(f"guilty-{n}", "eve", prompt, GREEDY, 24)
            events = [event async for event in engine.models.default.generate(request)]
            assert isinstance(events[-1], Failed)
        assert not patient.done()
        assert (await patient).finished.reason is FinishReason.LENGTH
