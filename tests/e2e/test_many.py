"""More at once than there is room for: nobody hears of anybody else, and nobody is forgotten."""

import json
import os
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPResponse
from pathlib import Path

import pytest

from tests.conftest import ordinary_text
from tests.e2e.conversations import Messages
from tests.process import ENDLESS, Server, chat, raw_post

NUM_AGENTS = 10
NUM_ROUNDS = 5
QUESTION = "What is the code for orchid?"
POOL_BYTES = 4 << 20


class Agent:
    """Was told a code that nobody else knows."""

    def __init__(self, server: Server, number: int) -> None:
        self.server = server
        self.name = f"agent-{number}"
        self.code = str(1234 + 731 * number)
        self.messages: Messages = []
        self.prompt = self.cached = 0

    def say(self, text: str) -> str:
        self.messages.append({"role": "user", "content": text})
        body = {"messages": self.messages, "temperature": 0, "max_tokens": 24}
        answer = self.server.post(body, **{"X-Agent-ID": self.name})
        assert answer.status_code == 200, answer.text
        usage, said = answer.json()["usage"], answer.json()["choices"][0]["message"]["content"]
        self.prompt = usage["prompt_tokens"]
        self.cached = usage["prompt_tokens_details"]["cached_tokens"]
        self.messages.append({"role": "assistant", "content": said})
        return str(said)

    def told(self) -> str:
        return self.say(f"Remember these facts:\n- the code for orchid is {self.code}")

    def asked(self) -> str:
        return self.say(QUESTION)


@pytest.mark.requirement("B-19", "B-31")
@pytest.mark.slow
def test_ten_agents_in_turns_know_their_own_and_nothing_else(tmp_path: Path) -> None:
    with Server(tmp_path).wait_ready() as server, ThreadPoolExecutor(NUM_AGENTS) as pool:
        agents = [Agent(server, n) for n in range(NUM_AGENTS)]
        codes = {agent.code for agent in agents}
        list(pool.map(Agent.told, agents))
        prompt = cached = 0
        for _ in range(NUM_ROUNDS - 1):
            for agent, said in zip(agents, pool.map(Agent.asked, agents), strict=True):
                assert {code for code in codes if code in said} == {agent.code}, said
                prompt += agent.prompt
                cached += agent.cached
        assert cached > 0.8 * prompt


@pytest.mark.requirement("B-20")
@pytest.mark.slow
def test_more_agents_than_ram_has_room_for(tmp_path: Path) -> None:
    """The oldest are on disk only, and everybody is answered."""
    texts = [ordinary_text()[2500 * n : 2500 * (n + 1)] for n in range(8)]
    with Server(tmp_path, "--pool-bytes", str(POOL_BYTES)).wait_ready() as server:
        for n, text in enumerate(texts):
            answer = server.ask(text, f"agent-{n}", max_tokens=4)
            assert answer.status_code == 200
            server.wait_until(partial(is_on_disk, server, n))
            assert server.metric("pool_bytes") <= POOL_BYTES
        assert server.metric("disk_bytes") > POOL_BYTES
        assert in_tier(server, 0, "memory") == 0
        assert in_tier(server, len(texts) - 1, "memory") == in_all(server, len(texts) - 1)
        again = server.ask(texts[0], "agent-0", max_tokens=4)
        usage = again.json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1
        assert f"disk={usage['prompt_tokens'] - 1}" in again.headers["x-cache"]


def in_tier(server: Server, number: int, tier: str) -> int:
    answer = server.get(f"/v1/agents/agent-{number}")
    return int(answer.json()["tiers"][tier]) if answer.is_success else 0


def is_on_disk(server: Server, number: int) -> bool:
    return in_tier(server, number, "disk") == in_all(server, number) > 0


def in_all(server: Server, number: int) -> int:
    answer = server.get(f"/v1/agents/agent-{number}")
    return int(answer.json()["tokens"]) if answer.is_success else 0


@pytest.mark.requirement("B-26", "L-16", "L-20")
def test_a_hundred_at_once_and_probes_meanwhile(tmp_path: Path) -> None:
    """Each is answered or told when to come back; probes never wait; then all is as before."""
    with Server(tmp_path, "--max-requests", "60").wait_ready() as server:
        clients = [server.connect() for _ in range(100)]
        for n, client in enumerate(clients):
            client.sendall(raw_post(chat(f"{n} {ENDLESS}", max_tokens=15, user=f"agent-{n}")))
        server.wait_until(lambda: server.metric("running") > 0)
        probes, busy = list[float](), True
        while busy:
            began = time.monotonic()
            assert server.get("/healthz").status_code == 200
            probes.append(time.monotonic() - began)
            busy = server.metric("running") + server.metric("waiting") > 0
        answers = [heard(client) for client in clients]
        count = Counter(answer.status for answer in answers)
        assert set(count) == {200, 503} and count[200] >= 60, count
        for answer in answers:
            if answer.status == 503:
                assert json.load(answer)["error"]["code"] == "queue_full"
                assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert len(probes) > 10 and max(probes) < 1
        assert server.get("/readyz").status_code == 200
        assert server.ask("Hello!").status_code == 200
        tasks = Path(f"/proc/{server.pid}/task")
        assert not tasks.exists() or len(list(tasks.iterdir())) < 20 + 2 * (os.cpu_count() or 1)
        assert not server.events("check_failed") and "Traceback" not in server.log()


def heard(client: socket.socket) -> HTTPResponse:
    """An answer, whose body is still to be read; the connection is then closed."""
    with client:
        answer = HTTPResponse(client)
        answer.begin()
        return answer
