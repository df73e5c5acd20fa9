"""A model with recurrent layers through the real engine: it goes on from checkpoints, and what it
says then is what it says cold.

The model is tiny and random, with the built-in tokenizer and a template that, like those of models
that reason, opens a thought for the answer and leaves earlier ones out.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from agent_memory.block import BLOCK_TOKENS
from agent_memory.engine.engine import Engine
from agent_memory.kv_spec import KVSpec
from agent_memory.request import Conversation, Finding
from agent_memory.store.heads import Head
from tests.conftest import ordinary_text
from tests.engine.test_engine import Answer, ask, running, steps_of
from tests.model import tiny

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n'"
    " + m['content'].split('</think>')[-1] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
Messages = list[dict[str, str]]


@pytest.fixture(
    scope="module", params=["qwen3_5", pytest.param("falcon_h1", marks=pytest.mark.slow)]
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind = str(request.param)
    return tiny.save(kind, tmp_path_factory.mktemp("model") / kind, TEMPLATE)


@asynccontextmanager
async def serving(model: Path, state: Path) -> AsyncIterator[Engine]:
    async with running(state, model=str(model)) as engine:
        yield engine


def spec_of(engine: Engine) -> KVSpec:
    return steps_of(engine).loaded.proven.spec


async def heads_of(engine: Engine, agent: str) -> tuple[Head, ...]:
    """What was told is remembered a moment later."""
    await engine._on_thread(lambda: None)
    return engine._store.agents.known(agent).heads


def send_back(engine: Engine) -> None:
    for seq in list(steps_of(engine).scheduler):
        steps_of(engine)._preempt(seq)


async def say(engine: Engine, messages: Messages, agent: str = "ann") -> Answer:
    """As the server asks."""
    prompt = tuple(await engine.models.default.tokenize(Conversation(messages), agent))
    stable = await engine.models.default.stable_tokens(Conversation(messages), prompt)
    assert 0 < stable < len(prompt)
    return await ask(engine, prompt, agent, stable_tokens=stable)


def said(num_characters: int, start: int = 0) -> Messages:
    text = ordinary_text()[start : start + num_characters]
    return [{"role": "user", "content": f"Read this: {text}"}]


def goes_on(talk: Messages, answer: Answer, more: str = "And then?") -> Messages:
    """The answer comes back without its thought."""
    reply = {"role": "assistant", "content": "It was so.", "told": answer.text}
    return [*talk, reply, {"role": "user", "content": more}]


async def cold(model: Path, state: Path, messages: Messages) -> Answer:
    async with serving(model, state) as engine:
        answer = await say(engine, messages)
    assert answer.cached == 0
    return answer


async def stable_of(engine: Engine, messages: Messages) -> int:
    return await engine.models.default.stable_tokens(
        Conversation(messages), await engine.models.default.tokenize(Conversation(messages), None)
    )


@pytest.mark.parametrize("num_characters", [300, pytest.param(3000, marks=pytest.mark.slow)])
async def test_a_conversation_goes_on_from_its_last_stable_boundary(
    folder: Path, tmp_path: Path, num_characters: int
) -> None:
    """In RAM, and from disk after a restart; the answers are those of a cold start."""
    talk = said(num_characters)
    async with serving(folder, tmp_path / "a") as engine:
        first = await say(engine, talk)
        boundary = await stable_of(engine, talk)
        second = goes_on(talk, first)
        from_ram = await say(engine, second)
        assert from_ram.cached == boundary
        again = await say(engine, second)
        assert again.cached == await stable_of(engine, second)
        assert again.started.compared.finding is Finding.WHOLE
        assert again.started.compared.went_back > 0
    async with serving(folder, tmp_path / "a") as engine:
        from_disk = await say(engine, second)
        assert from_disk.started.from_disk == from_disk.cached == again.cached
    want = await cold(folder, tmp_path / "b", second)
    assert from_ram.text == again.text == from_disk.text == want.text


async def test_a_tool_loop_reuses_everything_up_to_the_last_stable_boundary(
    folder: Path, tmp_path: Path
) -> None:
    talk = said(1500)
    async with serving(folder, tmp_path / "a") as engine:
        answer = await say(engine, talk)
        for n in range(3):
            boundary = await stable_of(engine, talk)
            called = {"role": "assistant", "content": f"<think>{n}</think>look({n})"}
            talk = [
                *talk,
                called,
                {"role": "tool", "content": f"Tool {n} says: {answer.text[:40]}"},
            ]
            answer = await say(engine, talk)
            assert answer.cached == boundary
    assert answer.text == (await cold(folder, tmp_path / "b", talk)).text


async def test_a_turn_goes_on_from_its_very_end(folder: Path, tmp_path: Path) -> None:
    """Where the next prompt has all that was generated."""
    async with serving(folder, tmp_path / "a") as engine:
        prompt = tuple(await engine.models.default.tokenize(Conversation(said(1000)), None))
        first = await ask(engine, prompt, "ann", 24)
        [head] = await heads_of(engine, "ann")
        ids = [i for block in head.chain for i in block.token_ids()]
        longer = (*ids, *engine.models.default.tokenizer.encode(" And then?"))
        second = await ask(engine, longer, "ann", 24)
    assert second.cached == len(ids) == len(prompt) + first.finished.completion_tokens - 1
    async with serving(folder, tmp_path / "b") as engine:
        want = await ask(engine, longer, "ann", 24)
    assert want.cached == 0 and second.text == want.text


@pytest.mark.slow
async def test_long_prompts_have_regular_checkpoints(folder: Path, tmp_path: Path) -> None:
    """Another question about the same long text."""
    async with serving(folder, tmp_path / "a") as engine:
        every = spec_of(engine).checkpoint_tokens
        talk = said(9000)
        await say(engine, talk)
        other = [{"role": "user", "content": talk[0]["content"][:-500] + " What is it about?"}]
        answer = await say(engine, other, "ben")
        alike = answer.started.compared.position
        assert answer.cached == alike // every * every >= BLOCK_TOKENS
        assert answer.started.compared.went_back == alike - answer.cached
    assert answer.text == (await cold(folder, tmp_path / "b", other)).text


async def test_agents_with_one_beginning_at_once(folder: Path, tmp_path: Path) -> None:
    """The second waits for what the first computes, and goes on just where they part."""
    system = {"role": "system", "content": ordinary_text()[:2500]}
    talks = [[system, {"role": "user", "content": f"{n} is my number."}] for n in range(3)]
    async with serving(folder, tmp_path / "a") as engine:
        answers = await asyncio.gather(
            *(say(engine, talk, f"agent-{n}") for n, talk in enumerate(talks))
        )
        prompts = [await engine.models.default.tokenize(Conversation(talk), None) for talk in talks]
    alike = next(i for i, (a, b) in enumerate(zip(*prompts[:2], strict=False)) if a != b)
    assert sorted(answer.cached for answer in answers) == [0, alike, alike]
    for n, answer in enumerate(answers):
        assert answer.text == (await cold(folder, tmp_path / f"b{n}", talks[n])).text


@pytest.mark.requirement("S-09")
async def test_each_tenant_goes_on_from_its_own(folder: Path, tmp_path: Path) -> None:
    """Who says the same at the same time waits for nobody of another tenant, and finds nothing."""
    talk, tenants = said(1000), ("ann", "acme/ann", "zoo/ann")
    async with serving(folder, tmp_path / "a") as engine:
        answers = await asyncio.gather(*(say(engine, talk, agent) for agent in tenants))
        assert [answer.cached for answer in answers] == [0, 0, 0]
        boundary = await stable_of(engine, talk)
        assert (await say(engine, talk, "acme/ben")).cached == boundary
    second = goes_on(talk, answers[0])
    want = await cold(folder, tmp_path / "b", second)
    async with serving(folder, tmp_path / "a") as engine:
        for agent in tenants:
            answer = await say(engine, second, agent)
            assert (answer.cached, answer.started.from_disk) == (boundary, boundary)
            assert answer.text == want.text


async def test_a_damaged_checkpoint_costs_time_only(folder: Path, tmp_path: Path) -> None:
    talk = said(3000)
    async with serving(folder, tmp_path / "a") as engine:
        first = await say(engine, talk)
    second = goes_on(talk, first)
    files = list((tmp_path / "a" / "state" / "blocks").glob("*/*.safetensors"))
    points = [f for f in files if b"agent-memory-checkpoint" in f.read_bytes()[:4096]]
    assert 2 <= len(points) < len(files)
    for file in points:
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
    async with serving(folder, tmp_path / "a") as engine:
        answer = await say(engine, second)
        compared = answer.started.compared  # whoever reads first, the request or what reads ahead
        assert answer.cached == 0
        assert compared.went_back > 900 or compared.finding is Finding.LOST
        again = await say(engine, second)
        assert again.cached == await stable_of(engine, second)
    want = await cold(folder, tmp_path / "b", second)
    assert answer.text == again.text == want.text


async def test_old_checkpoints_go_with_the_turns_they_were_for(
    folder: Path, tmp_path: Path
) -> None:
    talk, counts = said(600), []
    async with serving(folder, tmp_path / "a") as engine:
        for n in range(5):
            talk = goes_on(talk, await say(engine, talk), f"What about {n}?")
            counts.append(len((await heads_of(engine, "ann"))[0].checkpoints))
    assert max(counts) <= 4  # its own two, the one it went on from, a regular one


async def test_a_sequence_sent_back_to_wait_goes_on_where_it_stopped(
    folder: Path, tmp_path: Path
) -> None:
    """What it had computed is matched again, up to its last token."""
    async with serving(folder, tmp_path / "a") as engine:
        prompt = tuple(await engine.models.default.tokenize(Conversation(said(2000)), "ann"))
        whole = await ask(engine, prompt, "ann", 200)
    async with serving(folder, tmp_path / "b") as engine:
        under_way = asyncio.Event()
        running_one = asyncio.create_task(ask(engine, prompt, "ann", 200, under_way=under_way))
        await under_way.wait()
        await engine._on_thread(partial(send_back, engine))
        assert (await running_one).text == whole.text
