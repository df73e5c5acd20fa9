"""An engine that died or stands still, in a real server: said at once, answered, ended with 70."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.conftest import ordinary_text
from tests.process import ENDLESS, Server, chat, raw_post


def reason_of(answer: httpx.Response) -> str:
    """Of a 503, which must say when to come back."""
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
    reason: str = answer.json()["reason"]
    return reason


def ended_with(server: Server, reason: str) -> list[str]:
    """It ended as a supervisor must see it, and its store was closed in order."""
    assert server.wait(30) == 70, server.log()
    failed: list[str] = server.event("server_shutdown_incomplete")["failed"]
    assert failed[0] == reason
    assert {"stop_admission", "drain", "persist"}.isdisjoint(failed)
    return failed


@pytest.mark.requirement("L-18")
def test_a_dead_engine_is_told_and_its_requests_are_answered(tmp_path: Path) -> None:
    with Server(tmp_path, failpoint="engine.turn,engine.fail_all").wait_ready() as server:
        with ThreadPoolExecutor(2) as pool:
            whole = pool.submit(server.ask, "Hello")
            since = time.monotonic()
            refused = whole.result(20)
        assert refused.status_code == 500
        assert refused.json()["error"]["code"] == "engine_dead"
        assert "stop_engine" in ended_with(server, "engine_dead")
        assert time.monotonic() - since < 15
        assert server.event("engine_died") and server.event("engine_given_up")["requests"] == 1


@pytest.mark.requirement("L-18")
def test_an_engine_that_stands_still_is_given_up(tmp_path: Path) -> None:
    failpoint = "engine.stall:1,engine.turn:block"
    with Server(tmp_path, failpoint=failpoint).wait_ready() as server:
        used = time.monotonic()
        with ThreadPoolExecutor(2) as pool:
            stream = pool.submit(streamed, server)
            server.wait_until(lambda: server.get("/healthz").status_code == 503)
            assert time.monotonic() - used > 1
            assert reason_of(server.get("/healthz")) == "engine_stalled"
            assert reason_of(server.get("/readyz")) == "engine_stalled"
            assert server.metric("engine_turn_age_seconds") > 1
            assert "engine_stalled" in stream.result(20)
        ended_with(server, "engine_stalled")
        states = [(line["was"], line["now"]) for line in server.events("engine_state")]
        assert states == [("ok", "engine_stalled")]
        stacks = (server.state_dir / "run" / "fault.log").read_text()
        assert "in failpoint" in stacks and "engine_stalled" in stacks


def streamed(server: Server) -> str:
    return server.post(chat(ENDLESS, stream=True)).text


def test_one_slow_turn_is_a_stall_that_passes(tmp_path: Path) -> None:
    failpoint = "engine.stall:2,engine.turn:3"
    with Server(tmp_path, failpoint=failpoint).wait_ready() as server:
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(server.ask, "Hello", max_tokens=1)
            server.wait_until(lambda: server.get("/healthz").status_code == 503)
            server.wait_until(lambda: server.get("/healthz").status_code == 200)
            assert answer.result(30).status_code == 200
        assert [line["now"] for line in server.events("engine_state")] == ["engine_stalled", "ok"]
        server.signal()
        assert server.wait(20) == 0


def test_memory_that_is_short_is_a_reason_to_wait(tmp_path: Path) -> None:
    """Nobody is refused for it; who asks whether it would be served at once hears no."""
    flags = ("--memory-bytes", "64M", "--pool-bytes", "8M", "--kv-bits", "none")
    failpoint = "engine.turn:0.2"  # so slow that it lasts
    with Server(tmp_path, *flags, failpoint=failpoint).wait_ready() as server:
        clients = [server.connect() for _ in range(4)]
        for n, client in enumerate(clients):
            text = ordinary_text()[n * 6000 : (n + 1) * 6000]
            client.sendall(raw_post(chat(text, max_tokens=512)))
        server.wait_until(lambda: server.metric("waiting") >= 1)
        server.wait_until(lambda: server.get("/readyz").status_code == 503)
        assert reason_of(server.get("/readyz")) == "memory_pressure"
        assert server.get("/healthz").status_code == 200
        for client in clients:
            client.close()
        server.wait_until(lambda: server.get("/readyz").status_code == 200)
