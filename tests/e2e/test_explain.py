"""Causes of a miss over HTTP, with real processes and files: three conversations each."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.talks import TALKS, Talk
from tests.process import Server

Messages = list[dict[str, Any]]


def first(talk: Talk, system: str | None = None) -> Messages:
    return [
        {"role": "system", "content": system or talk.system},
        {"role": "user", "content": talk.user},
    ]


def then(talk: Talk, reply: str, system: str | None = None) -> Messages:
    answer = {"role": "assistant", "content": reply}
    return [*first(talk, system), answer, {"role": "user", "content": "And what else?"}]


class Asker:
    """Asks and looks up why; the header and the explanation must agree."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._asked = 0
        self.last = ""

    def ask(self, agent: str, messages: Messages, **fields: object) -> tuple[str, dict[str, Any]]:
        self._asked += 1
        self.last = request_id = f"asked-{id(self)}-{self._asked}"
        body = {"messages": messages, "temperature": 0, "max_tokens": 20, **fields}
        headers = {"X-Agent-ID": agent, "X-Request-ID": request_id}
        answer = self.server.post(body, **headers)
        assert answer.status_code == 200, answer.text
        why: dict[str, Any] = self.server.get(f"/v1/requests/{request_id}/explain").json()
        whole = why["cause"] == "none"
        assert answer.headers["x-cache"].endswith(f"cause={why['cause']}") is not whole
        assert (why["differs"] is None) is whole
        usage = answer.json()["usage"]
        assert why["tokens"]["cached"] == usage["prompt_tokens_details"]["cached_tokens"]
        return answer.json()["choices"][0]["message"]["content"], why

    def settle(self, agent: str) -> None:
        """An answer is told first and remembered then."""
        self.server.wait_until(lambda: self._is_on_disk(agent))

    def _is_on_disk(self, agent: str) -> bool:
        view = self.server.get(f"/v1/agents/{agent}").json()
        return "tiers" in view and bool(view["tiers"]["disk"] == view["tokens"] > 0)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asker]:
    with Server(tmp_path_factory.mktemp("causes")) as server:
        yield Asker(server.wait_ready())


talks = pytest.mark.parametrize("talk", TALKS, ids=lambda talk: talk.name)


@talks
def test_a_turn_then_the_next_then_another_date_then_another_answer(
    running: Asker, talk: Talk
) -> None:
    reply, why = running.ask(talk.name, first(talk))
    assert why["cause"] == "never_seen"
    running.settle(talk.name)
    assert running.ask(talk.name, then(talk, reply))[1]["cause"] == "none"

    _, why = running.ask(talk.name, then(talk, reply, talk.later_system))
    assert why["cause"] == "date_or_counter_changed"
    assert why["differs"]["field"] == "messages[0].content"
    at = why["differs"]["character"]
    assert talk.later_system[at:].startswith(why["differs"]["prompt"])
    assert talk.system[at:].startswith(why["differs"]["remembered"])

    _, why = running.ask(talk.name, then(talk, "No idea at all."))
    assert why["cause"] == "prompt_changed"
    assert why["differs"]["field"] == "messages[2].content"


def test_an_agent_that_was_deleted_has_not_been_seen(running: Asker) -> None:
    """Nor is there an explanation of what it asked."""
    said = [{"role": "user", "content": "Between us: the orchid is blue."}]
    running.ask("gone", said)
    running.settle("gone")
    assert running.server.delete("/v1/agents/gone").status_code == 204
    assert running.server.get(f"/v1/requests/{running.last}/explain").status_code == 404
    assert running.ask("gone", said)[1]["cause"] == "never_seen"


@talks
def test_a_reply_that_the_model_spelled_oddly(running: Asker, talk: Talk) -> None:
    """At a high temperature it does; a reply that ends in half a character comes back changed."""
    causes = []
    for seed in range(12):
        agent = f"{talk.name}-{seed}"
        reply, _ = running.ask(agent, first(talk), temperature=2, top_p=1, top_k=0, seed=seed)
        running.settle(agent)
        causes.append(running.ask(agent, then(talk, reply))[1]["cause"])
        if "reply_tokenized_differently" in causes:
            break
    assert causes[-1] == "reply_tokenized_differently"
    assert set(causes) <= {"reply_tokenized_differently", "none", "prompt_changed"}


@pytest.mark.slow
def test_damaged_then_wiped_then_another_model(tmp_path: Path) -> None:
    replies = {}
    with Server(tmp_path).wait_ready() as server:
        asker = Asker(server)
        for talk in TALKS:
            replies[talk.name], _ = asker.ask(talk.name, first(talk))
            asker.settle(talk.name)
        server.stop()

    blocks = tmp_path / "state" / "blocks"
    for file in blocks.rglob("*.safetensors"):
        raw = bytearray(file.read_bytes())
        raw[-100] ^= 1
        file.write_bytes(raw)
    with Server(tmp_path, "--pool-bytes", "2M").wait_ready() as server:
        asker = Asker(server)
        for talk in TALKS:
            _, why = asker.ask(talk.name, then(talk, replies[talk.name]))
            assert (why["cause"], why["lost"]) == ("damaged_file", "damaged")
            asker.settle(talk.name)

        for folder in blocks.iterdir():
            shutil.rmtree(folder)
            folder.mkdir()
        for n in range(4):  # the pool has room for something else only
            asker.ask("other", [{"role": "user", "content": f"{n} word" * 300}], max_tokens=1)
        for talk in TALKS:
            _, why = asker.ask(talk.name, then(talk, replies[talk.name]))
            assert (why["cause"], why["lost"]) == ("evicted", "missing")
            asker.settle(talk.name)
        server.stop()

    with Server(tmp_path, "--kv-bits", "4").wait_ready() as server:
        asker = Asker(server)
        for talk in TALKS:
            _, why = asker.ask(talk.name, then(talk, replies[talk.name]))
            assert why["cause"] == "other_model"
            asker.settle(talk.name)
            assert asker.ask(talk.name, then(talk, replies[talk.name]))[1]["cause"] == "none"
