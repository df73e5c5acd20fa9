"""Forked, rewound, exported and imported agents go on as if they had never been anything else.

Every answer from memory is compared with that of a server that remembers nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from agent_memory.request import Conversation
from tests.cold import Answer, ColdOf
from tests.conftest import DEFAULT_KV_BITS, builtin_model, ordinary_text
from tests.e2e.conversations import Messages, judge
from tests.process import Server

FACTS = "Remember these facts:\n- the code for orchid is 7319\n- my favorite color is teal"
READ = "Read this:\n" + ordinary_text()[9000:13000]
QUESTIONS = ("What is the code for orchid?", "What is my favorite color?")


class Talk:
    """One agent's conversation with one server."""

    def __init__(self, server: Server, agent: str, messages: Messages | None = None) -> None:
        self.server = server
        self.agent = agent
        self.messages: Messages = list(messages or [])

    def say(self, text: str) -> Answer:
        self.messages.append({"role": "user", "content": text})
        answer = Answer.of(self.server, self.messages, self.agent)
        self.messages.append({"role": "assistant", "content": answer.text})
        return answer

    def settled(self) -> dict[str, Any]:
        """The agent, when all that was said is on disk."""
        tokens = self.num_remembered()
        self.server.wait_until(lambda: self._is_on_disk(tokens))
        return self.look()

    def num_remembered(self) -> int:
        """How many tokens of the conversation can be remembered: up to the model's last word."""
        return len(encoded(self.messages[:-1])) + 1

    def _is_on_disk(self, at_least: int) -> bool:
        shown = self.look()
        return "tiers" in shown and shown["tiers"]["disk"] == shown["tokens"] >= at_least

    def look(self) -> dict[str, Any]:
        shown: dict[str, Any] = self.server.get(f"/v1/agents/{self.agent}").json()
        return shown

    def do(self, verb: str, **body: object) -> dict[str, Any]:
        answer = self.server.post(body, f"/v1/agents/{self.agent}/{verb}")
        assert answer.is_success, answer.text
        shown: dict[str, Any] = answer.json()
        return shown


def encoded(messages: Messages) -> list[int]:
    return builtin_model(8).tokenizer.encode_chat(Conversation(messages))


@contextmanager
def serving(folder: Path, kv_bits: int | None) -> Iterator[Server]:
    folder.mkdir(exist_ok=True)
    with Server(folder, "--kv-bits", str(kv_bits or "none")) as server:
        yield server.wait_ready()


def assert_as_cold(cold: ColdOf, kv_bits: int | None, restored: Answer, messages: Messages) -> None:
    """`messages` end with the restored answer."""
    computed = cold(kv_bits).answer(messages[:-1])
    assert computed.prompt == restored.prompt
    if computed.text != restored.text:
        parting = judge(builtin_model(kv_bits), messages[:-1], restored.text, computed.text)
        assert kv_bits is not None and parting.is_tie, parting


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("kv_bits", DEFAULT_KV_BITS)
def test_forked_agents_go_their_own_ways(tmp_path: Path, kv_bits: int | None, cold: ColdOf) -> None:
    with serving(tmp_path / "state", kv_bits) as server:
        one = Talk(server, "one")
        one.say(FACTS)
        one.say(READ)
        known = one.settled()["tokens"]
        one.do("fork", name="two")
        two = Talk(server, "two", one.messages)
        answers = [talk.say(text) for talk, text in zip((one, two), QUESTIONS, strict=True)]
        assert all(answer.cached >= known for answer in answers)
        assert two.settled()["blocks"]["shared"] >= 4
        assert one.look()["tokens"] != 0 and one.look()["blocks"]["own"] >= 1
        again = two.say("Hello!")  # it goes on on its own, one or more blocks further
        assert again.cached >= answers[1].prompt
        assert server.event("server_listening") and not server.events("check_failed")
    for talk, answer in zip((one, two), (answers[0], again), strict=True):
        assert_as_cold(cold, kv_bits, answer, talk.messages)


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("kv_bits", DEFAULT_KV_BITS)
def test_a_rewound_agent_goes_on_from_there(
    tmp_path: Path, kv_bits: int | None, cold: ColdOf
) -> None:
    with serving(tmp_path / "state", kv_bits) as server:
        talk = Talk(server, "ann")
        talk.say(FACTS)
        before = talk.settled()["tokens"]
        kept = list(talk.messages)
        talk.say(READ)
        talk.settled()
        assert talk.do("rewind", turn=1)["tokens"] == before
        server.stop()
    with serving(tmp_path / "state", kv_bits) as server:
        talk = Talk(server, "ann", kept)
        shown = talk.look()
        assert (shown["tokens"], shown["tiers"]["disk"]) == (before, before)
        assert len(shown["heads"][0]["turns"]) == 1
        answer = talk.say(QUESTIONS[0])
        assert answer.cached >= before - 1
        talk.settled()
        assert not server.events("check_failed")
    assert_as_cold(cold, kv_bits, answer, talk.messages)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("kv_bits", DEFAULT_KV_BITS)
def test_export_wipe_import_and_go_on(tmp_path: Path, kv_bits: int | None, cold: ColdOf) -> None:
    with serving(tmp_path / "first", kv_bits) as server:
        talk = Talk(server, "ann")
        talk.say(FACTS)
        talk.say(READ)
        shown = talk.settled()
        exported = server.get("/v1/agents/ann/export")
        assert len(exported.content) == int(exported.headers["content-length"])
        stayed = Talk(server, "ann", talk.messages)
        unmoved = stayed.say(QUESTIONS[0])
    with serving(tmp_path / "second", kv_bits) as server:
        assert send(server, exported.content).status_code == 201
        talk = Talk(server, "ann", talk.messages)
        moved = talk.look()
        same = ("tokens", "bytes", "blocks")
        assert {name: moved[name] for name in same} == {name: shown[name] for name in same}
        assert moved["tiers"] == {"memory": 0, "disk": shown["tokens"]}
        assert moved["heads"][0]["turns"] == shown["heads"][0]["turns"]
        answer = talk.say(QUESTIONS[0])
        assert (answer.text, answer.cached) == (unmoved.text, unmoved.cached)
    assert_as_cold(cold, kv_bits, answer, talk.messages)


def send(server: Server, raw: bytes, **params: str) -> httpx.Response:
    headers = {"Content-Type": "application/x-tar"}
    return server.call("POST", "/v1/agents/import", content=raw, params=params, headers=headers)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_imports_that_are_refused_change_nothing(tmp_path: Path) -> None:
    with serving(tmp_path / "four", 4) as other:
        foreign = Talk(other, "ann")
        foreign.say(FACTS)
        foreign.settled()
        of_other_bits = other.get("/v1/agents/ann/export").content
    with serving(tmp_path / "eight", 8) as server:
        talk = Talk(server, "ann")
        talk.say(FACTS)
        talk.say(READ)
        talk.settled()
        good = server.get("/v1/agents/ann/export").content
        before = (server.get("/v1/agents").json()["data"][0]["tokens"], files(server))

        def refused(raw: bytes, status: int, code: str, **params: str) -> str:
            answer = send(server, raw, **params)
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
            return str(answer.json()["error"]["message"])

        said = refused(of_other_bits, 409, "other_model", name="bob")
        assert said.count("builtin") == 2
        refused(good, 409, "agent_exists")
        refused(good, 400, "invalid_agent_id", name="a/b")
        refused(b"", 400, "not_an_export", name="bob")
        refused(b"PK\x03\x04" + bytes(5000), 400, "not_an_export", name="bob")
        refused(good[:-600], 400, "damaged_export", name="bob")
        for part in range(1, 16):
            flipped = bytearray(good)
            flipped[len(good) * part // 16] ^= 1
            refused(bytes(flipped), 400, "damaged_export", name="bob")
        assert files(server) == before[1]
        agents = server.get("/v1/agents").json()["data"]
        assert [(agent["id"], agent["tokens"]) for agent in agents] == [("ann", before[0])]

        assert send(server, good, name="bob").status_code == 201
        assert files(server) == before[1]  # ann has the same blocks
        assert not list((server.state_dir / "tmp").iterdir())


def files(server: Server) -> set[str]:
    return {path.name for path in (server.state_dir / "blocks").rglob("*.safetensors")}


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_what_was_rewound_is_not_exported(tmp_path: Path, cold: ColdOf) -> None:
    with serving(tmp_path / "first", 8) as server:
        talk = Talk(server, "ann")
        talk.say(FACTS)
        tokens = talk.settled()["tokens"] - 5
        assert talk.do("rewind", tokens=tokens)["heads"][0]["blocks"] == 1
        raw = server.get("/v1/agents/ann/export").content
    with serving(tmp_path / "second", 8) as server:
        assert send(server, raw).status_code == 201
        talk = Talk(server, "ann", talk.messages)
        assert talk.look()["tokens"] == tokens
        answer = talk.say(QUESTIONS[0])
        assert answer.cached == tokens
    assert_as_cold(cold, 8, answer, talk.messages)


@pytest.mark.timeout(180)
def test_an_agent_is_exported_while_it_goes_on(tmp_path: Path) -> None:
    with serving(tmp_path / "state", 8) as server:
        talk = Talk(server, "ann")
        talk.say(FACTS)
        talk.say(READ)
        shown = talk.settled()
        with server.streamed("GET", "/v1/agents/ann/export") as answer:
            pieces = answer.iter_raw(1000)
            raw = next(pieces)
            talk.say(QUESTIONS[0])  # its last block is replaced by a longer one
            talk.settled()
            assert server.post({}, "/v1/agents/ann/pin").is_success
            raw += b"".join(pieces)
        assert send(server, raw, name="copy").json()["tokens"] == shown["tokens"]
        server.wait_until(lambda: not list((server.state_dir / "tmp").iterdir()))


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_damaged_block_is_never_exported(tmp_path: Path) -> None:
    with serving(tmp_path / "state", 8) as server:
        talk = Talk(server, "ann")
        talk.say(READ)
        shown = talk.settled()
        damage(server)
        with pytest.raises(httpx.RemoteProtocolError, match="closed connection"):
            server.get("/v1/agents/ann/export")
        assert server.event("export_failed")["agent"] == "ann"
        server.wait_until(lambda: server.metric('restore_rejected_total{reason="checksum"}') == 1)
        again = server.get("/v1/agents/ann/export")  # the block is in RAM still
        assert again.status_code == 200
        server.stop()
    with serving(tmp_path / "state", 8) as server:
        assert server.get("/v1/agents/ann").json()["tokens"] < shown["tokens"]
        assert send(server, again.content, name="whole").json()["tokens"] == shown["tokens"]
        assert send(server, server.get("/v1/agents/ann/export").content, name="cut").is_success
        damage(server)
        talk = Talk(server, "whole", talk.messages)
        talk.say(QUESTIONS[0])  # finds it out, and computes it again
        talk.settled()
        assert server.get("/v1/agents/whole/export").status_code == 200


def damage(server: Server) -> None:
    """A block that is not the first."""
    [head, *_] = server.get("/v1/agents").json()["data"][0]["heads"]
    parent = f'"parent":"{head["fingerprint"]}'.encode()
    files = sorted((server.state_dir / "blocks").rglob("*.safetensors"))
    file = next(path for path in files if parent not in path.read_bytes())
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
