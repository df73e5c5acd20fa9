"""The end of the process, with real clients, signals and exit statuses.

Each case is a function of a folder.  All run once; the slow pass runs each twenty times.
"""

import json
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from agent_memory.metrics import Metrics
from agent_memory.stages import STAGES
from agent_memory.store.block_store import BlockStore
from agent_memory.store.state_dir import StateDir
from tests.process import ENDLESS, Server, chat, content, post_head, raw_post, read_until

PROMISE_S = 15.0
"""On top of the drain time-out."""
PROMPT = 112
"""Tokens of the endless request."""


def serving(folder: Path, drain_s: float = 20, failpoint: str = "") -> Server:
    return Server(folder, "--drain-timeout", str(drain_s), failpoint=failpoint).wait_ready()


def streaming(server: Server, pool: ThreadPoolExecutor) -> "Future[list[str]]":
    """An endless answer for the agent ann, begun."""
    answer = pool.submit(server.stream, ENDLESS, "ann")
    server.wait_until(lambda: server.metric("running") == 1)
    return answer


def assert_complete(server: Server, since: float, within_s: float) -> None:
    """It went in time, every stage did its work, and the log tells figures and no tracebacks."""
    assert server.wait(within_s + PROMISE_S) == 0, server.log()
    assert time.monotonic() - since < within_s, server.log()
    last = json.loads(server.log().splitlines()[-1])
    assert last["event"] == "server_shutdown_complete" and last["exit"] == 0
    assert list(last["stages"]) == list(STAGES)
    assert all({"ms", "budget_ms"} <= set(stage) for stage in last["stages"].values())
    assert last["stages"]["release_memory"]["active_bytes"] < 1 << 20
    assert [event["stage"] for event in server.events("shutdown_stage")] == list(STAGES)
    assert "Traceback" not in server.log()


def tokens_on_disk(server: Server, agent: str) -> int:
    """Of the agent's newest head, read from the directory that the process left behind."""
    state_dir = StateDir.open(server.state_dir)
    try:
        store = BlockStore.open(state_dir, Metrics())
        try:
            owner = store.agents.get(agent)
            assert owner is not None
            chain = owner.heads[0].chain
            assert all(store.find(block.hash) for block in chain)
            return sum(block.num_tokens for block in chain)
        finally:
            assert store.close(5)
    finally:
        state_dir.close()


def assert_cut_in_form(events: list[str]) -> None:
    """What a client sees of an answer that the server's end cut short."""
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["code"] == "draining"
    assert content(events)


def idle(folder: Path) -> None:
    with serving(folder) as server:
        used = server.ask("Hello", agent="ann").json()["usage"]["total_tokens"]
        assert_complete(server, server.signal(), 5)
        names = [line["event"] for line in server.lines()]
        life = ["server_listening", "model_ready", "request_done", "signal"]
        assert [name for name in names if name in life] == life
        assert tokens_on_disk(server, "ann") == used


def interrupted(folder: Path) -> None:
    with serving(folder) as server:
        assert_complete(server, server.signal(signal.SIGINT), 5)


def sixteen_streams_that_finish(folder: Path) -> None:
    with serving(folder) as server, ThreadPoolExecutor(16) as pool:
        answers = [
            pool.submit(server.stream, ENDLESS, f"agent-{n}", max_tokens=60) for n in range(16)
        ]
        server.wait_until(lambda: server.metric("running") == 16)
        since = server.signal()
        for answer in answers:
            events = answer.result(20)
            assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
            assert events[-1] == "[DONE]" and "0" * 60 in content(events)
        assert_complete(server, since, 20)
        stages = server.event("server_shutdown_complete")["stages"]
        assert (stages["drain"]["finished"], stages["drain"]["ended"]) == (16, 0)
        computed = PROMPT + 60 - 1  # nothing was asked of the last token
        assert {tokens_on_disk(server, f"agent-{n}") for n in range(16)} == {computed}


def an_endless_stream(folder: Path) -> None:
    with serving(folder, drain_s=1) as server, ThreadPoolExecutor(1) as pool:
        answer = streaming(server, pool)
        since = server.signal()
        assert_cut_in_form(answer.result(10))
        assert_complete(server, since, 1 + 4)
        assert server.event("server_shutdown_complete")["stages"]["drain"]["ended"] == 1
        assert tokens_on_disk(server, "ann") > PROMPT


def a_client_that_never_reads(folder: Path) -> None:
    with serving(folder, drain_s=1) as server, server.connect_and_stall(user="ann"):
        assert server.metric("stalled_connections") == 1
        assert server.metric("running") == 1
        since = server.signal()
        assert_complete(server, since, 1 + 5)
        assert server.event("connections_aborted")["count"] == 1
        assert tokens_on_disk(server, "ann") > PROMPT


def a_second_signal(folder: Path) -> None:
    with serving(folder, drain_s=60) as server, ThreadPoolExecutor(1) as pool:
        answer = streaming(server, pool)
        server.signal()
        server.wait_until(lambda: server.get("/readyz").json()["status"] == "draining")
        since = server.signal()
        server.signal()
        assert_cut_in_form(answer.result(10))
        assert_complete(server, since, 4)


def new_work_while_draining(folder: Path) -> None:
    with serving(folder) as server, ThreadPoolExecutor(1) as pool:
        with server.connect() as idle_client:
            idle_client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200" in read_until(idle_client, b"}")
            answer = streaming(server, pool)
            server.signal()
            server.wait_until(lambda: server.get("/readyz").status_code == 503)
            refused = server.ask("Hello")
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
            assert refused.headers["connection"] == "close"
            assert int(refused.headers["retry-after"]) > 0
            idle_client.sendall(raw_post(chat("Hello")))
            assert b"503" in read_until(idle_client, b"}}")
            assert server.get("/healthz").json()["phase"] == "draining"
        since = server.signal()
        assert_cut_in_form(answer.result(10))
        assert_complete(server, since, 4)


def half_a_request(folder: Path) -> None:
    with serving(folder) as server, server.connect() as body, server.connect() as head:
        body.sendall(post_head(1000) + b"{")
        head.sendall(b"POST /v1/chat")
        server.wait_until(lambda: server.metric("connections") == 3)
        assert_complete(server, server.signal(), 5)


def a_whole_answer_is_cut_with_its_status(folder: Path) -> None:
    with serving(folder, drain_s=0) as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.ask, ENDLESS)
        server.wait_until(lambda: server.metric("running") == 1)
        since = server.signal()
        refused = answer.result(10)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        assert "retry-after" in refused.headers
        assert_complete(server, since, 4)


def while_the_model_loads(folder: Path) -> None:
    with Server(folder) as server:
        assert_complete(server, server.signal(), 5)


def the_same_port_at_once(folder: Path) -> None:
    with serving(folder, drain_s=0) as first, ThreadPoolExecutor(1) as pool:
        answer = streaming(first, pool)
        first.signal()
        assert first.wait(10) == 0
        answer.result(10)
        with Server(folder, port=first.port) as second:
            assert second.port == first.port
            second.wait_ready()
            assert_complete(second, second.signal(), 5)


CASES = [
    idle,
    interrupted,
    sixteen_streams_that_finish,
    an_endless_stream,
    a_client_that_never_reads,
    a_second_signal,
    new_work_while_draining,
    half_a_request,
    a_whole_answer_is_cut_with_its_status,
    while_the_model_loads,
    the_same_port_at_once,
]
Case = Callable[[Path], None]


@pytest.mark.requirement("B-01", "B-04", "B-30", "F-10", "L-22", "L-23", "L-27", "L-29", "L-31")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_shutdown(case: Case, tmp_path: Path) -> None:
    case(tmp_path)


@pytest.mark.requirement("B-30", "F-10")
@pytest.mark.slow
@pytest.mark.suite("shutdown, each way 20 times", planned=20 * len(CASES))
@pytest.mark.parametrize("n", range(20))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_shutdown_again_and_again(case: Case, n: int, tmp_path: Path) -> None:
    case(tmp_path)


def test_an_import_that_is_being_proven_is_not_waited_for(tmp_path: Path) -> None:
    with (
        serving(tmp_path, drain_s=1, failpoint="engine.import:block") as server,
        ThreadPoolExecutor() as pool,
    ):
        used = server.ask("Hello", agent="ann").json()["usage"]["total_tokens"]
        server.wait_on_disk("ann", used)
        file = server.get("/v1/agents/ann/export").content
        kind = {"content-type": "application/x-tar"}
        path = "/v1/agents/import?name=eve"
        importing = pool.submit(server.call, "POST", path, content=file, headers=kind)
        time.sleep(0.5)
        since = server.signal()
        assert server.wait(1 + PROMISE_S) == 0, server.log()
        assert time.monotonic() - since < 1 + PROMISE_S / 2
        assert server.event("server_shutdown_complete")
        assert isinstance(importing.exception(), httpx.TransportError)
    assert tokens_on_disk(server, "ann") == used


@pytest.mark.requirement("L-28")
def test_a_stage_that_raises(tmp_path: Path) -> None:
    raises_in("persist", tmp_path)


@pytest.mark.requirement("L-28")
@pytest.mark.slow
@pytest.mark.suite("shutdown, each stage raises", planned=len(STAGES))
@pytest.mark.parametrize("stage", STAGES)
def test_any_stage_that_raises(stage: str, tmp_path: Path) -> None:
    raises_in(stage, tmp_path)


def raises_in(stage: str, folder: Path) -> None:
    """The stages after it run all the same, and what was committed before is on disk."""
    with serving(folder, drain_s=1, failpoint=f"shutdown.{stage}") as server:
        used = server.ask("Hello", agent="ann").json()["usage"]["total_tokens"]
        server.wait_on_disk("ann", used)
        since = server.signal()
        assert server.wait(1 + PROMISE_S) == 70, server.log()
        assert time.monotonic() - since < 1 + PROMISE_S
        assert server.event("server_shutdown_incomplete")["failed"] == [stage]
        assert not server.events("server_shutdown_complete")
        stages = server.events("shutdown_stage")
        assert [(s["stage"], s["ok"]) for s in stages] == [(s, s != stage) for s in STAGES]
        assert tokens_on_disk(server, "ann") == used


@pytest.mark.requirement("L-30")
@pytest.mark.slow
@pytest.mark.suite("shutdown, a stage blocks", planned=1)
def test_a_stage_that_blocks_everything_meets_the_hard_deadline(tmp_path: Path) -> None:
    with serving(tmp_path, drain_s=0, failpoint="shutdown.persist:block") as server:
        since = server.signal()
        assert server.wait(PROMISE_S) == 70
        assert 14 < time.monotonic() - since < PROMISE_S
        assert server.event("server_shutdown_incomplete")["failed"] == ["persist"]
        assert "in failpoint" in (server.state_dir / "run" / "fault.log").read_text()
