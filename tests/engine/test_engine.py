"""The real engine with the built-in model and a real store, driven as the server drives it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest

from agent_memory import config, failpoint
from agent_memory.block import BLOCK_TOKENS
from agent_memory.engine.engine import Engine
from agent_memory.engine.phase import Phase
from agent_memory.engine.step_loop import StepLoop
from agent_memory.errors import (
    BadRequest,
    ContextLengthExceeded,
    EngineFailed,
    MemoryExceeded,
    Unavailable,
)
from agent_memory.metrics import Metrics
from agent_memory.model import footprint
from agent_memory.model_source import parse
from agent_memory.request import (
    Conversation,
    Delta,
    Failed,
    Finished,
    FinishReason,
    GenerateRequest,
    Priority,
    SamplingParams,
    Started,
)
from agent_memory.store.block_store import BlockStore
from agent_memory.store.state_dir import StateDir
from agent_memory.tenants import tenant_of
from tests.conftest import ordinary_text

GREEDY = SamplingParams(temperature=0)
ENDLESS = "Repeat this:\n" + "0" * 100
FACTS = (
    "Remember these facts:\n- the code for orchid is 7319\nRead this:\n" + ordinary_text()[:2500]
)


@asynccontextmanager
async def running(folder: Path, **settings: object) -> AsyncIterator[Engine]:
    """An engine on a state directory; all six stages at the end."""
    flags = {"state_dir": folder / "state", "pool_bytes": 256 << 20, "kv_bits": None, **settings}
    if isinstance(flags.get("model"), str):
        flags["model"] = [parse(str(flags["model"]))]
    with_flags = config.load(flags, {}, None)
    before = mx.get_active_memory()  # other tests of this process keep models of their own
    state_dir = StateDir.open(folder / "state")
    metrics = Metrics()
    engine = Engine(with_flags, BlockStore.open(state_dir, metrics), metrics)
    engine.start(asyncio.get_running_loop())
    try:
        async with engine.models.use(None):
            pass
        yield engine
    finally:
        engine.stop_admission()
        await engine.drain(0.0, asyncio.Event())
        await engine.persist(10)
        await engine.stop()
        await engine.unload()
        figures = await engine.release(10)
        state_dir.close()
    assert figures["active_bytes"] - before < 1 << 20
    with pytest.raises(Unavailable):
        async with engine.models.use(None):
            pass


def steps_of(engine: Engine, model: str | None = None) -> StepLoop:
    return engine._residents.loops[engine.models.find(model).name]


@dataclass
class Answer:
    text: str
    started: Started
    finished: Finished

    @property
    def cached(self) -> int:
        return self.started.cached_tokens


async def ask(
    engine: Engine,
    prompt: str | tuple[int, ...],
    agent: str | None = "ann",
    max_tokens: int | None = 24,
    stop: tuple[str, ...] = (),
    priority: Priority = Priority.INTERACTIVE,
    under_way: asyncio.Event | None = None,
    stable_tokens: int = 0,
) -> Answer:
    """`under_way`: set when 100 tokens have been generated.  The tenant is the agent's."""
    tokens = prompt if isinstance(prompt, tuple) else await tokenized(engine, prompt)
    request = GenerateRequest(
        *(f"r{id(tokens)}", agent, tokens, GREEDY, max_tokens, stop, priority, stable_tokens),
        tenant=tenant_of(agent) if agent else None,
    )
    texts, started = [], None
    async with aclosing(engine.models.default.generate(request)) as events:
        async for event in events:
            match event:
                case Started():
                    started = event
                case Delta(text, num_tokens):
                    texts.append(text)
                    if under_way and num_tokens >= 100:
                        under_way.set()
                case Failed(error):
                    raise error
                case Finished():
                    assert started is not None
                    return Answer("".join(texts), started, event)
    raise AssertionError("no last event")


async def tokenized(engine: Engine, text: str) -> tuple[int, ...]:
    said = Conversation([{"role": "user", "content": text}])
    return tuple(await engine.models.default.tokenize(said, None))


@pytest.mark.requirement("B-12", "B-16")
async def test_again_from_memory_and_from_disk_after_a_restart(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        cold = await ask(engine, FACTS)
        assert cold.cached == 0
        again = await ask(engine, FACTS)
        assert again.started.from_memory == cold.started.prompt_tokens - 1
    async with running(tmp_path) as engine:
        restored = await ask(engine, FACTS)
        assert restored.started.from_disk == cold.started.prompt_tokens - 1
        kept = await ask(engine, FACTS)  # what was read stays in RAM
        assert kept.started.from_memory == cold.started.prompt_tokens - 1
        assert cold.text == again.text == restored.text == kept.text


@pytest.mark.requirement("B-14")
async def test_a_match_is_exact_to_the_token_and_generated_tokens_count(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        prompt = await tokenized(engine, FACTS)
        first = await ask(engine, prompt)
        other = (*prompt[:500], *prompt[501:])
        assert (await ask(engine, other, "ben")).cached == 500
        [head] = engine.agents.one("ann").heads
        assert head.num_tokens == len(prompt) + first.finished.completion_tokens
        assert (await ask(engine, (5, 6, 7), "cleo")).cached == 0


@pytest.mark.requirement("B-22")
async def test_at_once_as_alone_and_one_run_for_one_prefix(tmp_path: Path) -> None:
    prompts = [FACTS, ENDLESS, FACTS + " more", "Hello!"]
    async with running(tmp_path / "alone") as engine:
        alone = [(await ask(engine, p, f"a{i}")).text for i, p in enumerate(prompts)]
    async with running(tmp_path / "at-once") as engine:
        at_once = await asyncio.gather(*(ask(engine, p, f"a{i}") for i, p in enumerate(prompts)))
        assert [a.text for a in at_once] == alone
        tokens = await tokenized(engine, FACTS)
        twins = await asyncio.gather(*(ask(engine, tokens, f"t{i}") for i in range(3)))
        assert len({twin.text for twin in twins}) == 1
        assert all(twin.cached == len(tokens) - 1 for twin in twins)


async def test_closing_cancels_and_what_was_computed_is_kept(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        prompt = await tokenized(engine, ENDLESS)
        request = GenerateRequest("gone", "ann", prompt, GREEDY, None)
        async with aclosing(engine.models.default.generate(request)) as events:
            async for event in events:
                if isinstance(event, Delta) and event.num_tokens >= 20:
                    break
        await ask(engine, "Hello!", "ben")  # a turn later
        [head] = engine.agents.one("ann").heads
        assert engine.num_active == 0
        assert head.num_tokens >= len(prompt) + 19


@pytest.mark.requirement("L-09")
async def test_limits(tmp_path: Path) -> None:
    async with running(tmp_path, context_length=1024) as engine:
        context = engine.models.default.known.context_length
        filler = tuple(5 + i % 900 for i in range(context + 1))
        full = await ask(engine, filler[: context - 1], max_tokens=50)
        assert full.finished == Finished(FinishReason.LENGTH, 1)
        for length in (context, context + 1):
            with pytest.raises(ContextLengthExceeded):
                await ask(engine, filler[:length])
        with pytest.raises(BadRequest):
            await ask(engine, ())
        with pytest.raises(BadRequest):
            await ask(engine, (engine.models.default.known.vocab_size,))
        cut = await ask(engine, ENDLESS, max_tokens=7)
        assert cut.finished == Finished(FinishReason.LENGTH, 7)


async def test_stop_strings_end_the_answer_before_them(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        whole = await ask(engine, FACTS + "\nWhat is the code for orchid?")
        stop = whole.text[3:9]
        stopped = await ask(engine, FACTS + "\nWhat is the code for orchid?", stop=(stop,))
        assert stopped.text == whole.text[: whole.text.index(stop)]
        assert (stopped.finished.reason, stopped.finished.stop) == (FinishReason.STOP, stop)
        assert (whole.finished.reason, whole.finished.stop) == (FinishReason.STOP, None)


@pytest.mark.requirement("B-17")
async def test_a_damaged_file_is_a_miss_and_the_answer_the_same(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        cold = await ask(engine, FACTS)
    files = sorted((tmp_path / "state" / "blocks").rglob("*.safetensors"))
    for file in files:
        file.chmod(0o600)
        raw = bytearray(file.read_bytes())
        raw[-100] ^= 1
        file.write_bytes(raw)
    async with running(tmp_path) as engine:
        again = await ask(engine, FACTS)
        assert (again.cached, again.text) == (0, cold.text)


async def test_without_memory_for_a_run_nothing_is_restored_and_the_answer_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as engine:
        cold = await ask(engine, FACTS)
        monkeypatch.setenv(failpoint.VARIABLE, "restore.grow")
        without = await ask(engine, FACTS)
        monkeypatch.delenv(failpoint.VARIABLE)
        restored = await ask(engine, FACTS)
        assert (without.cached, restored.cached) == (0, cold.started.prompt_tokens - 1)
        assert cold.text == without.text == restored.text


async def test_a_pool_too_small_for_anything_costs_only_time(tmp_path: Path) -> None:
    async with running(tmp_path / "small", pool_bytes=1 << 20) as engine:
        small = [(await ask(engine, p)).text for p in (FACTS, FACTS, "Hello!")]
    async with running(tmp_path / "large") as engine:
        assert small == [(await ask(engine, p)).text for p in (FACTS, FACTS, "Hello!")]


def memory_for(engine: Engine, num_tokens: int, pool_bytes: int) -> int:
    """A budget that leaves room for the KV of so many tokens in one context, and a block."""
    fixed = {**steps_of(engine).room.ledger.figures(), "restore": pool_bytes // 8}
    parts = sum(fixed[name] for name in ("weights:builtin", "step:builtin", "restore"))
    per_token = steps_of(engine).room._cost.token_bytes + steps_of(engine).room._cost.context_bytes
    left = 80 - 80 // 20 - 80 // 16  # eightieths, without headroom and what is kept when freed
    return (parts + per_token * (num_tokens + BLOCK_TOKENS)) * 80 // left + 80


@pytest.mark.requirement("F-21")
async def test_background_work_gives_way_and_goes_on_and_a_sequence_ends_where_memory_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = FACTS[:1500]
    # Measured again it would be a little more or less.
    monkeypatch.setattr(footprint, "step_bytes", lambda *_: 6 << 20)
    async with running(tmp_path / "alone") as engine:
        slow = await ask(engine, ENDLESS, "slow", max_tokens=400)
        quick = await ask(engine, short, "quick")
        memory_bytes = memory_for(engine, 650, 8 << 20)
    tight = {"memory_bytes": memory_bytes, "pool_bytes": 8 << 20}
    async with running(tmp_path / "tight", **tight) as engine:
        assert 640 <= engine.models.default.most_tokens <= 660
        with pytest.raises(MemoryExceeded, match="for 1012 tokens"):
            await ask(engine, tuple(range(5, 505)), max_tokens=None)
        under_way = asyncio.Event()
        background = asyncio.create_task(
            ask(engine, ENDLESS, "slow", 400, priority=Priority.BACKGROUND, under_way=under_way)
        )
        await under_way.wait()
        asked = [asyncio.create_task(ask(engine, short, f"quick-{n}")) for n in range(2)]
        for task in asked:
            assert (await task).text == quick.text
        assert not background.done()
        assert (await background).text == slow.text
        assert engine._residents._metrics.preemptions._value.get() >= 1
        until_full = await ask(engine, ENDLESS, "full", max_tokens=None)
        assert until_full.finished.reason is FinishReason.LENGTH
        total = until_full.started.prompt_tokens + until_full.finished.completion_tokens
        assert abs(engine.models.default.most_tokens - total) <= BLOCK_TOKENS


@pytest.mark.requirement("F-22")
async def test_a_step_that_raises_ends_the_guilty_request_only(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        alone = await ask(engine, FACTS + " others", "ben", max_tokens=60)

        def poison() -> bool:
            """A wrong shape in the tail of the request that is to fail, until it is there."""
            for seq in steps_of(engine).scheduler.admitted:
                if seq.request.id == "guilty" and seq.num_generated > 3 and seq.kv:
                    for tail in seq.kv.tails.values():
                        tail.arrays = [mx.zeros((1, 7, 512, 64)) for _ in tail.arrays]
                    return True
            return False

        async def guilty() -> None:
            prompt = await tokenized(engine, ENDLESS)
            async for event in engine.models.default.generate(
                GenerateRequest("guilty", "eve", prompt, GREEDY, None)
            ):
                if isinstance(event, Failed):
                    raise event.error
                await engine._on_thread(poison)

        failing = asyncio.create_task(guilty())
        other = await ask(engine, FACTS + " others", "ben", max_tokens=60)
        with pytest.raises(EngineFailed):
            await failing
        assert other.text == alone.text
        assert (await ask(engine, "Hello!")).finished.reason is FinishReason.STOP


async def test_hurry_ends_an_endless_answer_at_once_and_keeps_it(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        prompt = await tokenized(engine, ENDLESS)
        hurry, ends = asyncio.Event(), []

        async def endless() -> None:
            request = GenerateRequest("e", "ann", prompt, GREEDY, None)
            async for event in engine.models.default.generate(request):
                if isinstance(event, Delta) and event.num_tokens > 10:
                    hurry.set()
                if isinstance(event, Finished):
                    ends.append(event.reason)

        task = asyncio.create_task(endless())
        await hurry.wait()
        engine.stop_admission()
        assert (await engine.drain(60, hurry))["ended"] == 1
        await task
        assert ends == [FinishReason.SHUTDOWN]
        [head] = engine.agents.one("ann").heads
        assert head.num_tokens > len(prompt) + 9


async def test_a_model_that_is_not_there_is_told(tmp_path: Path) -> None:
    state_dir = StateDir.open(tmp_path / "state")
    flags = {"state_dir": tmp_path / "state", "model": parse(str(tmp_path / "nowhere"))}
    metrics = Metrics()
    engine = Engine(config.load(flags, {}, None), BlockStore.open(state_dir, metrics), metrics)
    engine.start(asyncio.get_running_loop())
    with pytest.raises(Unavailable, match="nowhere"):
        async with engine.models.use(None):
            pass
    assert engine.phase is Phase.FAILED
    engine.stop_admission()
    await engine.persist(5)
    await engine.stop()
    await engine.unload()
    await engine.release(5)
    state_dir.close()


async def test_the_engine_sleeps_while_nobody_can_begin(tmp_path: Path) -> None:
    """It looks again when something has changed, and not all the time."""
    async with running(tmp_path) as engine:
        steps = steps_of(engine)
        hold = partial(steps.room.ledger.measure, "somebody else")
        await engine._on_thread(partial(hold, steps.room.ledger.budget_bytes))
        answer = asyncio.create_task(ask(engine, "Hello!"))
        await asyncio.sleep(0.3)
        assert steps.scheduler.waiting and not steps.has_work and not answer.done()
        await engine._on_thread(partial(hold, 0))
        assert (await answer).text
        del steps, hold
