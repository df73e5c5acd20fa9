"""How much one agent may ask, by a clock of our own and of a real server."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from agent_memory.errors import TooManyRequests
from agent_memory.server.quotas import SWEPT_ABOVE, Quotas
from tests.process import ENDLESS, Server


class Clock:
    """Stands still unless it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def refused(quotas: Quotas, agent: str | None) -> int:
    """And told to come back in so many seconds."""
    with pytest.raises(TooManyRequests) as caught:
        quotas.enter(agent)
    assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
    return caught.value.retry_after


@pytest.mark.requirement("B-10")
@pytest.mark.parametrize("agent", ["ada", None])
def test_at_once(agent: str | None) -> None:
    quotas = Quotas(at_once=2)
    leave, _ = quotas.enter(agent), quotas.enter(agent)
    assert refused(quotas, agent) == refused(quotas, agent) == 1
    quotas.enter("other")
    leave()
    quotas.enter(agent)
    refused(quotas, agent)


@pytest.mark.requirement("B-10")
def test_a_minute() -> None:
    clock = Clock()
    quotas = Quotas(per_minute=4, clock=clock)
    for _ in range(4):
        quotas.enter("ada")()
    assert refused(quotas, "ada") == 15
    clock.now += 10
    assert refused(quotas, "ada") == 5
    quotas.enter("ben")
    clock.now += 5
    quotas.enter("ada")
    assert refused(quotas, "ada") == 15
    clock.now += 600  # what is saved up is a minute's, no more
    for _ in range(4):
        quotas.enter("ada")
    refused(quotas, "ada")


def test_who_is_refused_for_one_limit_does_not_pay_for_the_other() -> None:
    clock = Clock()
    quotas = Quotas(at_once=1, per_minute=2, clock=clock)
    leave = quotas.enter("ada")
    for _ in range(9):
        assert refused(quotas, "ada") == 1
    leave()
    quotas.enter("ada")()
    assert refused(quotas, "ada") == 30


def test_nobody_is_known_for_ever() -> None:
    clock = Clock()
    quotas = Quotas(at_once=9, per_minute=60, clock=clock)
    for n in range(2 * SWEPT_ABOVE):
        quotas.enter(f"agent-{n}")()
        clock.now += 1
    assert quotas.num_known <= SWEPT_ABOVE + 1


def test_without_limits_there_are_none() -> None:
    quotas = Quotas()
    for _ in range(1000):
        quotas.enter("ada")
    assert quotas.num_known == 1


@pytest.mark.requirement("B-10")
@pytest.mark.slow
def test_of_a_real_server(tmp_path: Path) -> None:
    limits = ("--agent-requests", "1", "--agent-requests-per-minute", "3")
    with Server(tmp_path, *limits).wait_ready() as server, ThreadPoolExecutor(1) as pool:
        going = pool.submit(server.stream, ENDLESS, "ada", max_tokens=800, user="ada")
        server.wait_until(lambda: server.metric("running") == 1)
        second = server.ask("Hello", agent="ada", max_tokens=1)
        assert second.status_code == 429 and second.headers["Retry-After"] == "1"
        assert second.json()["error"]["type"] == "rate_limit_error"
        streamed = server.ask("Hello", agent="ada", max_tokens=1, stream=True)
        assert streamed.status_code == 429
        assert server.ask("Hello", agent="ben", max_tokens=1).status_code == 200
        assert going.result()[-1] == "[DONE]"
        hello = [server.ask("Hi", agent="eve", max_tokens=1).status_code for _ in range(4)]
        assert hello == [200, 200, 200, 429]
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
        for path, error in (("/v1/messages", "rate_limit_error"), ("/v1/responses", None)):
            asked = body if error else {"input": "Hi"}
            answer = server.post(asked, path, X_Agent_ID="eve")
            assert answer.status_code == 429 and 1 <= int(answer.headers["Retry-After"]) <= 20
            assert error is None or answer.json()["error"]["type"] == error
        assert counted(server, body).status_code == 200
        several = {"prompt": ["a", "b", "c"], "max_tokens": 1}  # is one request
        done = server.post(several, "/v1/completions", X_Agent_ID="kim")
        assert done.status_code == 200, done.text
        finishes = [line["finish"] for line in server.events("request_done")]
        assert finishes.count("rate_limit_exceeded") == 5


def counted(server: Server, body: object) -> httpx.Response:
    """Counting is no answering."""
    return server.post(body, "/v1/messages/count_tokens", X_Agent_ID="eve")
