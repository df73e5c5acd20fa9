"""One model comes while another is in use all the time."""

import asyncio
import time
from pathlib import Path

import pytest

from agent_memory.engine import switching
from agent_memory.engine.served import Loaded
from tests.engine.test_engine import running
from tests.engine.test_models import PAGES, ask, budget_for, folders, named

__all__ = ["folders"]


@pytest.mark.slow
async def test_who_goes_on_asking_one_model_does_not_keep_another_out(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for both once fewer of the many talk at a time."""
    monkeypatch.setattr(switching, "WAIT_S", 10.0)
    budget = await budget_for(folders, tmp_path / "two", "a", "b")
    models = named(folders, "a", "b")
    async with running(
        tmp_path / "1", model=models, memory_bytes=budget, pool_bytes=1 << 20
    ) as engine:
        over = False

        async def talk(number: int) -> None:
            while not over:
                text = f"{number} {time.monotonic()} {PAGES}"
                await ask(engine, "a", text, f"agent-{number}", 40)

        talkers = [asyncio.create_task(talk(number)) for number in range(12)]
        try:
            await asyncio.sleep(1)
            assert (await engine.models.load("b")).phase is Loaded.READY
        finally:
            over = True
            await asyncio.gather(*talkers)
