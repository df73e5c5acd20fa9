"""A model whose layers see a window, through the real engine: what they hold stays small."""

from contextlib import aclosing
from pathlib import Path

import pytest

from agent_memory.engine.engine import Engine
from agent_memory.request import Delta, GenerateRequest
from tests.conftest import ordinary_text
from tests.engine.test_engine import GREEDY, running, steps_of, tokenized
from tests.model import tiny

TEXT = ordinary_text()[:6000]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("gemma3", tmp_path_factory.mktemp("model") / "gemma3")


async def told(engine: Engine) -> tuple[str, int]:
    """The answer, and the most bytes that its windows held meanwhile."""
    request = GenerateRequest("r", "ann", await tokenized(engine, TEXT), GREEDY, 24)
    text, most = "", 0
    async with aclosing(engine.models.default.generate(request)) as events:
        async for event in events:
            if isinstance(event, Delta):
                text += event.text
                most = max(most, await engine._on_thread(lambda: held_by_windows(engine)))
    return text, most


def held_by_windows(engine: Engine) -> int:
    kvs = [seq.kv for seq in steps_of(engine).scheduler.admitted if seq.kv]
    tails = (tail for kv in kvs for tail in kv.tails.values() if tail.window is not None)
    return sum(tail.nbytes for tail in tails)


async def test_windows_do_not_wait_for_room_in_the_pool(folder: Path, tmp_path: Path) -> None:
    """What cannot be copied out is not remembered, but does not stay in memory either."""
    async with running(tmp_path / "large", model=str(folder)) as engine:
        text, _ = await told(engine)
    async with running(tmp_path / "small", model=str(folder), pool_bytes=1 << 20) as engine:
        again, most = await told(engine)
        assert again == text and 0 < most <= steps_of(engine).room._cost.sequence_bytes
