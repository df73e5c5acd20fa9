"""Every reason not to ask now: its name, its status, and when to come back."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from agent_memory import config, failpoint
from agent_memory.engine.engine import Engine
from agent_memory.engine.phase import Phase, refusal
from agent_memory.keys import Caller
from agent_memory.metrics import Metrics
from agent_memory.server import app
from agent_memory.server.connections import Connections
from agent_memory.store.block_store import BlockStore
from agent_memory.store.state_dir import StateDir


@asynccontextmanager
async def asked(folder: Path) -> AsyncIterator[tuple[Engine, httpx.AsyncClient]]:
    """The routes before an engine that is never started: what it is at is set by hand."""
    state_dir, metrics = StateDir.open(folder), Metrics()
    store = BlockStore.open(state_dir, metrics)
    engine = Engine(config.load({"max_requests": 1}, {}, None), store, metrics)
    engine._own_phase = Phase.READY
    routes = app.build(lambda app: asynccontextmanager(_nothing)())

    async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"] = {
            "engine": engine,
            "metrics": metrics,
            "connections": Connections(1, 8),
            "caller": Caller(),
        }
        await routes(scope, receive, send)

    transport = httpx.ASGITransport(with_state)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield engine, client
    finally:
        store.close(5)
        state_dir.close()


async def _nothing() -> AsyncIterator[dict[str, object]]:
    yield {}


def loading(engine: Engine) -> None:
    engine._own_phase = Phase.LOADING


def failed(engine: Engine) -> None:
    engine._own_phase, engine.models.default.failure = Phase.FAILED, "no such file"


def draining(engine: Engine) -> None:
    engine._own_phase = Phase.DRAINING


def crash_loop(engine: Engine) -> None:
    engine._own_phase = Phase.HELD


def queue_full(engine: Engine) -> None:
    engine.queue.enter(None)


def engine_dead(engine: Engine) -> None:
    engine.heartbeat.ended(as_told=False)


def engine_stalled(engine: Engine) -> None:
    engine.heartbeat.woken()
    time.sleep(0.02)


ALIVE_OR_NOT = [
    (loading, 200),
    (failed, 200),
    (draining, 200),
    (crash_loop, 200),
    (queue_full, 200),
    (engine_dead, 503),
    (engine_stalled, 503),
]


@pytest.mark.parametrize(
    ("cause", "health"), ALIVE_OR_NOT, ids=lambda case: getattr(case, "__name__", str(case))
)
async def test_each_reason(
    cause: Callable[[Engine], None], health: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(failpoint.VARIABLE, "engine.stall:0.01")
    async with asked(tmp_path / "state") as (engine, client):
        assert (await client.get("/readyz")).status_code == 200
        assert (await client.get("/healthz")).status_code == 200
        cause(engine)
        ready, alive = await client.get("/readyz"), await client.get("/healthz")
        assert ready.status_code == 503 and alive.status_code == health
        for answer in (ready, alive):
            if answer.status_code == 503:
                assert answer.json()["reason"] == answer.json()["status"] == cause.__name__
                assert 1 <= int(answer.headers["retry-after"]) <= 60


@pytest.mark.parametrize("phase", [p for p in Phase if p not in (Phase.STARTING, Phase.READY)])
def test_each_phase_refuses_with_its_reason(phase: Phase) -> None:
    said = refusal(phase, {"step": "weights"}, "no such file")
    assert said.status == 503 and 1 <= said.retry_after <= 60
    assert said.reason == ("draining" if phase is Phase.STOPPED else phase)


def test_safe_mode_says_what_to_do() -> None:
    assert "agent-memory doctor --reset" in str(refusal(Phase.HELD, {}, None))
