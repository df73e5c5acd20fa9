"""Models that come and go on one real engine, with what their agents have in mind."""

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest
from structlog.testing import capture_logs

from agent_memory.engine import switching
from agent_memory.engine.engine import Engine
from agent_memory.engine.served import Loaded
from agent_memory.errors import Conflict, NotFound, Unavailable
from agent_memory.model_source import ModelSource
from agent_memory.request import Conversation, Delta, Failed, GenerateRequest, Started
from tests.conftest import ordinary_text
from tests.engine.test_engine import GREEDY, running
from tests.model import tiny

BIG = {"hidden_size": 512, "intermediate_size": 1024}
PAGES = ordinary_text()[:1200]
ROOM = 1200
"""Tokens that a small budget leaves room for, about."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models a, b and c, alike in size; `big` is larger."""
    folder = tmp_path_factory.mktemp("models")
    for name, kind in (("a", "llama"), ("b", "qwen3"), ("c", "llama")):
        tiny.save(kind, folder / name)
    with (folder / "c" / "tokenizer.json").open("a") as file:
        file.write("\n")  # another model to all who look
    tiny.save("qwen3", folder / "big", None, **BIG)
    return folder


def named(folders: Path, *names: str) -> list[ModelSource]:
    """One with a * is pinned."""
    return [
        ModelSource(name.strip("*"), str(folders / name.strip("*")), pinned="*" in name)
        for name in names
    ]


@dataclass
class Answer:
    text: str
    cached: int
    prompt_tokens: int


async def ask(
    engine: Engine,
    model: str | None,
    text: str,
    agent: str = "ann",
    max_tokens: int = 12,
    each: Callable[[], object] = lambda: None,
) -> Answer:
    """`each`: called for each piece of the answer."""
    texts, started = [], None
    async with engine.models.use(model) as served:
        prompt = await served.tokenize(Conversation([{"role": "user", "content": text}]), None)
        request = GenerateRequest(
            f"r-{agent}-{time.monotonic()}", agent, prompt, GREEDY, max_tokens
        )
        async with aclosing(served.generate(request)) as events:
            async for event in events:
                match event:
                    case Started():
                        started = event
                    case Delta(piece):
                        texts.append(piece)
                        each()
                    case Failed(error):
                        raise error
    assert started is not None
    return Answer("".join(texts), started.cached_tokens, started.prompt_tokens)


def ready(engine: Engine) -> set[str]:
    assert set(engine._residents.loops) == {
        served.name for served in engine.models if served.phase is Loaded.READY
    }
    return set(engine._residents.loops)


def fixed(engine: Engine, model: str) -> int:
    return engine.models.find(model).known.fixed_bytes


async def budget_for(folders: Path, folder: Path, *names: str) -> int:
    """In which just these are in memory together, with room for about ROOM tokens."""
    async with running(folder, model=named(folders, *names), pool_bytes=8 << 20) as engine:
        for name in names:
            await engine.models.load(name)
        cost = max(
            (engine.models.find(name).known.cost for name in names), key=lambda c: c.token_bytes
        )
        room = (ROOM + 256) * (cost.token_bytes + cost.context_bytes)
        return (sum(fixed(engine, name) for name in names) + room + (1 << 20)) * 20 // 19


async def loads(engine: Engine, model: str) -> float:
    counter = engine._residents._metrics.model_loads.labels(model)
    return float(counter._value.get())


@pytest.mark.requirement("B-28")
async def test_there_and_back_every_agent_finds_its_memory_and_memory_is_the_models(
    folders: Path, tmp_path: Path
) -> None:
    budget = await budget_for(folders, tmp_path / "both", "b")
    models = named(folders, "a", "b")
    said: dict[tuple[str, str], Answer] = {}
    before = mx.get_active_memory()
    async with running(
        tmp_path / "one", model=models, memory_bytes=budget, pool_bytes=8 << 20
    ) as engine:
        for turn in range(2):
            for model in ("a", "b"):
                for agent in ("ann", "ben"):
                    answer = await ask(engine, model, f"{agent}: {PAGES}", agent)
                    first = said.setdefault((model, agent), answer)
                    assert answer.text == first.text
                    if turn:
                        assert answer.cached == answer.prompt_tokens - 1
                    else:  # but for how all prompts begin
                        assert answer.cached < 10
                assert ready(engine) == {model}
                own = fixed(engine, model) - _step(engine, model)
                await engine._on_thread(mx.clear_cache)
                assert abs(mx.get_active_memory() - before - own) < 1 << 20
    async with running(tmp_path / "one", model=models[::-1], pool_bytes=8 << 20) as engine:
        for (model, agent), first in said.items():  # also after a restart
            again = await ask(engine, model, f"{agent}: {PAGES}", agent)
            assert (again.text, again.cached) == (first.text, first.prompt_tokens - 1)
    for model in ("a", "b"):
        async with running(tmp_path / model, model=named(folders, model)) as engine:
            cold = await ask(engine, None, f"ann: {PAGES}", "ann")
            assert (cold.text, cold.cached) == (said[model, "ann"].text, 0)


def _step(engine: Engine, model: str) -> int:
    return engine._residents.ledger.figures()[f"step:{model}"]


async def test_two_in_memory_answer_at_once_as_alone(folders: Path, tmp_path: Path) -> None:
    asked = [(model, f"{n}: {PAGES[n * 50 :]}", f"{model}{n}") for n in range(3) for model in "ab"]
    async with running(tmp_path / "alone", model=named(folders, "a", "b")) as engine:
        alone = [(await ask(engine, *one)).text for one in asked]
        assert ready(engine) == {"a", "b"}
    async with running(tmp_path / "at-once", model=named(folders, "a", "b")) as engine:
        at_once = await asyncio.gather(*(ask(engine, *one) for one in asked))
        assert [answer.text for answer in at_once] == alone
        ledger = await engine._on_thread(engine._residents.ledger.figures)
        assert ledger["tails"] == 0 and {"runs:a", "runs:b"} <= ledger.keys()


async def test_however_many_ask_it_is_loaded_once(folders: Path, tmp_path: Path) -> None:
    async with running(tmp_path, model=named(folders, "a", "b")) as engine:
        answers = await asyncio.gather(*(ask(engine, "b", PAGES, f"x{n}") for n in range(10)))
        assert len({answer.text for answer in answers}) == 1
        assert await loads(engine, "b") == await loads(engine, "a") == 1
        with pytest.raises(NotFound, match="There is 'a', 'b'; a request without"):
            await ask(engine, "z", PAGES)


@pytest.mark.slow
async def test_who_was_used_longest_ago_leaves_and_the_pinned_never(
    folders: Path, tmp_path: Path
) -> None:
    budget = await budget_for(folders, tmp_path / "two", "a", "b")
    settings = {"memory_bytes": budget, "pool_bytes": 8 << 20}
    async with running(tmp_path / "1", model=named(folders, "a", "b", "c"), **settings) as engine:
        for model in ("a", "b", "a", "c"):
            await ask(engine, model, "Hello!")
        assert ready(engine) == {"a", "c"}
        await ask(engine, "b", "Hello!")
        assert ready(engine) == {"b", "c"}
    async with running(tmp_path / "2", model=named(folders, "a*", "b", "c"), **settings) as engine:
        for model in ("a", "b", "c"):
            await ask(engine, model, "Hello!")
        assert ready(engine) == {"a", "c"}


async def test_what_nobody_uses_goes_after_a_while_unless_it_is_pinned(
    folders: Path, tmp_path: Path
) -> None:
    models = named(folders, "a*", "b")
    async with running(tmp_path, model=models, model_idle_timeout=1.0) as engine:
        first = await ask(engine, "b", PAGES)
        await until(lambda: engine.models.find("b").phase is Loaded.UNLOADED)
        assert engine.models.find("a").phase is Loaded.READY
        again = await ask(engine, "b", PAGES)
        assert (again.text, again.cached) == (first.text, first.prompt_tokens - 1)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while True:
            if true():
                return
            await asyncio.sleep(0.02)


@pytest.mark.requirement("B-28")
async def test_who_is_being_answered_ends_on_its_model_and_who_comes_meanwhile_waits(
    folders: Path, tmp_path: Path
) -> None:
    async with running(tmp_path / "alone", model=named(folders, "a")) as engine:
        alone = await ask(engine, "a", PAGES, max_tokens=150)
    budget = await budget_for(folders, tmp_path / "one", "b")
    models = named(folders, "a", "b")
    async with running(
        tmp_path / "1", model=models, memory_bytes=budget, pool_bytes=8 << 20
    ) as engine:
        came, order = asyncio.Event(), list[str]()

        async def told(name: str, work: Awaitable[Answer]) -> Answer:
            answer = await work
            order.append(name)
            return answer

        long = asyncio.create_task(
            told("long", ask(engine, "a", PAGES, max_tokens=150, each=came.set))
        )
        await came.wait()
        other = asyncio.create_task(told("b", ask(engine, "b", "Hello!")))
        await until(lambda: engine.models.find("a").leaving)
        back = asyncio.create_task(told("a", ask(engine, "a", "Hello!", "ben")))
        assert (await long).text == alone.text
        await other
        await back
        assert order == ["long", "b", "a"] and ready(engine) == {"a"}


async def test_a_long_answer_goes_on_while_another_model_loads(
    folders: Path, tmp_path: Path
) -> None:
    async with running(tmp_path, model=named(folders, "a", "big")) as engine:
        moments = list[float]()
        long = asyncio.create_task(
            ask(
                engine,
                "a",
                "Hello!",
                max_tokens=1500,
                each=lambda: moments.append(time.monotonic()),
            )
        )
        await until(lambda: len(moments) > 20)
        began = time.monotonic()
        steps = set[str]()
        loading = asyncio.create_task(engine.models.load("big"))
        while not loading.done():
            progress = engine.models.find("big").progress
            steps.add(f"{progress.get('step')} {progress.get('done')}/{progress.get('of')}")
            await asyncio.sleep(0.001)
        ended = time.monotonic()
        assert not long.done()
        during = [moment for moment in moments if began <= moment <= ended]
        gaps = [later - earlier for earlier, later in zip(during, during[1:], strict=False)]
        assert len(during) >= 10 and len(steps) >= 3, steps
        assert sorted(gaps)[len(gaps) // 2] < 0.5  # the longest is a whole step of the new model
        long.cancel()


@pytest.mark.requirement("B-28")
async def test_what_fails_to_load_leaves_the_others_and_says_why(
    folders: Path, tmp_path: Path
) -> None:
    for name in ("cut", "gone", "odd", "folder"):
        tiny.save("llama", tmp_path / name)
    os.truncate(tmp_path / "cut" / "model.safetensors", 500_000)
    (tmp_path / "gone" / "model.safetensors").unlink()
    facts = json.loads((tmp_path / "odd" / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps({**facts, "hidden_size": 256}))
    (tmp_path / "folder" / "model.safetensors").unlink()
    (tmp_path / "folder" / "model.safetensors").mkdir()
    broken = [ModelSource(name, str(tmp_path / name)) for name in ("cut", "gone", "odd", "folder")]
    models = [*named(folders, "a"), *broken]
    async with running(tmp_path / "state", model=models) as engine:
        first = await ask(engine, "a", PAGES)
        for name, why in (
            ("cut", r"model\.safetensors is no whole safetensors file, \d+ bytes are missing"),
            ("gone", "no weights"),
            ("odd", "cannot be loaded"),
            ("folder", "IsADirectoryError"),
        ):
            with capture_logs() as logs, pytest.raises(Conflict, match=why):
                await engine.models.load(name)
            again = [line for line in logs if line["event"] == "model_load_again"]
            assert len(again) == (name == "folder")  # once by itself, after an OSError
            with pytest.raises(Unavailable, match=why):  # and not again for a request
                await ask(engine, name, "Hello!")
        later = await ask(engine, "a", PAGES)
        assert (later.text, later.cached) == (first.text, first.prompt_tokens - 1)
        tiny.save("qwen3", tmp_path / "mended")
        (tmp_path / "gone").rename(tmp_path / "gone-before")
        (tmp_path / "mended").rename(tmp_path / "gone")
        await engine.models.load("gone")
        assert (await ask(engine, "gone", "Hello!")).text


@pytest.mark.requirement("L-07")
async def test_there_must_be_memory_for_it_and_who_left_in_vain_comes_back(
    folders: Path, tmp_path: Path
) -> None:
    budget = await budget_for(folders, tmp_path / "one", "a")
    tiny.save("qwen3", tmp_path / "odd", None, hidden_size=192)
    facts = json.loads((tmp_path / "odd" / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps({**facts, "hidden_size": 128}))
    odd = replace(named(folders, "a")[0], name="odd", source=str(tmp_path / "odd"))
    models = [*named(folders, "a", "big"), odd]
    async with running(
        tmp_path / "state", model=models, memory_bytes=budget, pool_bytes=1 << 20
    ) as engine:
        first = await ask(engine, "a", "Hello!")
        with pytest.raises(Conflict, match="weights take 26 MB, and at most .* MB can be had"):
            await engine.models.load("big")
        assert await loads(engine, "a") == 1  # nothing was touched for it
        filler = engine._residents.ledger.spare_bytes - (1 << 20)
        await engine._on_thread(lambda: engine._residents.ledger.fix("somebody else", filler))
        with pytest.raises(Conflict, match="cannot be loaded"):
            await engine.models.load("odd")
        assert await loads(engine, "a") == 2 and ready(engine) == {"a"}
        await engine._on_thread(lambda: engine._residents.ledger.close("somebody else"))
        assert (await ask(engine, "a", "Hello!")).text == first.text


@pytest.mark.slow
async def test_a_prompt_too_long_beside_another_model_makes_that_one_leave(
    folders: Path, tmp_path: Path
) -> None:
    budget = await budget_for(folders, tmp_path / "two", "a", "b")
    long = " ".join(PAGES for _ in range(4))
    models = named(folders, "a", "b")
    async with running(
        tmp_path / "1", model=models, memory_bytes=budget, pool_bytes=8 << 20
    ) as engine:
        await ask(engine, "b", "Hello!")
        assert ready(engine) == {"a", "b"}
        assert (await ask(engine, "a", long)).prompt_tokens > ROOM
        assert ready(engine) == {"a"}
        async with engine.models.use("b"):
            with pytest.raises(Unavailable, match="memory for .* tokens now"):
                await ask(engine, "a", f"And {long}")


async def test_a_context_of_ones_own_is_told_and_kept_to(folders: Path, tmp_path: Path) -> None:
    [a, b] = named(folders, "a", "b")
    models = [replace(a, context_length=64), replace(b, context_length=8192)]
    async with running(tmp_path, model=models) as engine:
        await engine.models.load("b")
        shorter, longer = (engine.models.find(name) for name in "ab")
        assert "64 tokens, 2% of the 4096 it was made for" in shorter.warnings[0]
        assert "8192 tokens, 200% of the 4096" in longer.warnings[0]
        assert (shorter.known.context_length, longer.known.context_length) == (64, 8192)
        with pytest.raises(Exception, match="tokens and the model's context holds 64"):
            await ask(engine, "a", PAGES)
        assert (await ask(engine, "b", PAGES)).text


async def test_who_finds_no_room_to_come_back_comes_with_the_next_request(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save("qwen3", tmp_path / "odd", None, hidden_size=192)
    facts = json.loads((tmp_path / "odd" / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps({**facts, "hidden_size": 128}))
    models = [*named(folders, "a"), ModelSource("odd", str(tmp_path / "odd"))]
    async with running(tmp_path / "state", model=models, pool_bytes=1 << 20) as engine:
        filler = engine._residents.ledger.spare_bytes - (1 << 20)
        await engine._on_thread(lambda: engine._residents.ledger.fix("somebody else", filler))
        with monkeypatch.context() as patched:
            patched.setattr(switching, "WAIT_S", 0.2)
            reserve = engine._residents.reserve
            others = partial(_only, "odd", reserve)
            patched.setattr(engine._residents, "reserve", others)
            with pytest.raises(Conflict, match="cannot be loaded"):
                await engine.models.load("odd")
        await engine._on_thread(lambda: engine._residents.ledger.close("somebody else"))
        assert (await ask(engine, "a", "Hello!")).text


def _only(chosen: str, reserve: Callable[[str, int], bool], name: str, nbytes: int) -> bool:
    return name == chosen and reserve(name, nbytes)
