"""What people do with an agent's memory, over real sockets, with the built-in model."""

import json
from typing import Any

import httpx
import pytest

from tests.conftest import ordinary_text
from tests.process import CHAT, ENDLESS, Server, chat

LONG = "Read this:\n" + ordinary_text()[:2500]
OTHER = "Tell me:\n" + ordinary_text()[5000:7500]


def call(server: Server, method: str, path: str, body: object = None) -> httpx.Response:
    content = None if body is None else json.dumps(body)
    headers = {"Content-Type": "application/json"} if method == "POST" else {}
    return server.call(method, f"/v1/agents{path}", content=content, headers=headers)


def post(server: Server, path: str, body: object = None) -> httpx.Response:
    return call(server, "POST", path, body)


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def talk(server: Server, agent: str, *texts: str) -> dict[str, Any]:
    """One conversation of so many turns; -> the agent, all of it on disk."""
    messages: list[dict[str, str]] = []
    usage: dict[str, Any] = {}
    for text in texts:
        messages.append({"role": "user", "content": text})
        answer = server.post(
            {"messages": messages, "temperature": 0, "max_tokens": 8}, **{"X-Agent-ID": agent}
        ).json()
        messages.append(answer["choices"][0]["message"])
        usage = answer["usage"]
    assert usage
    server.wait_until(lambda: len(turns(server, agent)) == len(texts))
    end = turns(server, agent)[-1]["end"]
    assert usage["prompt_tokens"] <= end <= usage["total_tokens"]
    server.wait_on_disk(agent, end)
    shown: dict[str, Any] = call(server, "GET", f"/{agent}").json()
    return shown


def turns(server: Server, agent: str) -> list[dict[str, Any]]:
    answer = call(server, "GET", f"/{agent}")
    found: list[dict[str, Any]] = answer.json()["heads"][0]["turns"] if answer.is_success else []
    return found


def test_an_agent_is_shown_with_its_turns_and_their_text(server: Server) -> None:
    shown = talk(server, "shown", LONG, "Hello!")
    (head,) = shown["heads"]
    first, second = head["turns"]
    assert (first["turn"], first["start"], second["turn"]) == (1, 0, 2)
    assert 0 < first["prompt_end"] < first["end"] == second["start"] < second["prompt_end"]
    assert second["end"] == head["tokens"] == shown["tokens"] > 512
    assert head["blocks"] == sum(shown["blocks"].values()) == -(-head["tokens"] // 256)
    assert shown["bytes"] > 0 and not shown["pinned"]
    assert "prompt" not in first

    read = call(server, "GET", "/shown?text=true").json()["heads"][0]["turns"]
    assert LONG[:200] in read[0]["prompt"] and "Hello!" in read[1]["prompt"]
    assert read[1]["answer"] and "Hello!" not in read[0]["prompt"]
    assert code(call(server, "GET", "/shown?text=yes")) == (400, "invalid_value")


def test_a_fork_has_the_same_in_mind_and_writes_nothing(server: Server) -> None:
    old = talk(server, "tree", LONG, "Hello!")
    written = server.metric("bytes_written_total")
    answer = post(server, "/tree/fork", {"name": "branch"})
    assert answer.status_code == 201 and answer.headers["location"] == "/v1/agents/branch"
    new = call(server, "GET", "/branch").json()
    assert new["tokens"] == old["tokens"] and new["tiers"] == old["tiers"]
    assert new["heads"][0]["turns"] == old["heads"][0]["turns"]
    num_blocks = old["heads"][0]["blocks"]
    assert new["blocks"] == {"own": 0, "shared": num_blocks} and new["bytes_written"] == 0
    assert call(server, "GET", "/tree").json()["blocks"] == {"own": 0, "shared": num_blocks}
    assert server.metric("bytes_written_total") == written
    assert code(post(server, "/tree/fork", {"name": "branch"})) == (409, "agent_exists")
    assert code(post(server, "/tree/fork", {"name": "tree"})) == (409, "agent_exists")


def test_an_agent_is_rewound_to_a_turn_or_a_token(server: Server) -> None:
    old = talk(server, "back", LONG, "Hello!", "And now?")
    end = old["heads"][0]["turns"][0]["end"]
    assert code(post(server, "/back/rewind", {"turn": 4})) == (409, "beyond_the_end")
    assert code(post(server, "/back/rewind", {"tokens": 99999})) == (409, "beyond_the_end")
    written = server.metric("bytes_written_total")
    back = post(server, "/back/rewind", {"turn": 1}).json()
    assert back["tokens"] == end and back["heads"][0]["id"] == old["heads"][0]["id"]
    assert len(turns(server, "back")) == 1
    further = post(server, "/back/rewind", {"tokens": 300}).json()
    assert further["tokens"] == 300 and further["tiers"] == {"memory": 300, "disk": 300}
    assert further["heads"][0]["blocks"] == 2 and turns(server, "back") == []
    assert server.metric("bytes_written_total") == written


def test_an_agent_is_pinned_and_unpinned(server: Server) -> None:
    talk(server, "pin", "Hello!")  # the name of a verb is a name like any other
    assert post(server, "/pin/pin").json()["pinned"]
    assert post(server, "/pin/pin", {}).json()["pinned"]
    assert call(server, "GET", "/pin").json()["pinned"]
    assert not post(server, "/pin/unpin").json()["pinned"]


@pytest.mark.requirement("B-15", "B-31", "S-24")
def test_an_agent_that_is_deleted_leaves_nothing_that_was_its_alone(server: Server) -> None:
    talk(server, "gone", OTHER, "Hello!")
    kept = post(server, "/gone/fork", {"name": "kept"}).json()
    talk(server, "gone", OTHER, "Hello!", "And then what?")
    shown = call(server, "GET", "/gone").json()
    assert shown["blocks"]["own"] >= 1
    names = files(server)
    asked = server.ask("Hello!", agent="gone").headers["x-request-id"]
    assert server.get(f"/v1/requests/{asked}/explain").json()["agent"] == "gone"
    assert call(server, "DELETE", "/gone").status_code == 204
    assert code(call(server, "GET", "/gone")) == (404, "agent_not_found")
    assert code(call(server, "DELETE", "/gone")) == (404, "agent_not_found")
    assert server.get(f"/v1/requests/{asked}/explain").status_code == 404
    assert len(names - files(server)) == shown["blocks"]["own"]
    left = call(server, "GET", "/kept").json()
    assert (left["tokens"], left["tiers"]) == (kept["tokens"], kept["tiers"])
    assert left["blocks"]["own"] + left["blocks"]["shared"] == left["heads"][0]["blocks"]
    assert call(server, "DELETE", "/kept").status_code == 204
    again = server.ask(OTHER, agent="other", max_tokens=1).json()["usage"]
    assert again["prompt_tokens_details"]["cached_tokens"] < 20  # what all have in common


@pytest.mark.requirement("S-24")
def test_no_byte_of_a_deleted_agent_stays_on_disk(server: Server) -> None:
    talk(server, "somebody-with-a-secret", OTHER[::-1], "Hello!")
    own, before = files(server), on_disk(server)
    assert b"somebody-with-a-secret" in before
    assert call(server, "DELETE", "/somebody-with-a-secret").status_code == 204
    gone = {name[:64] for name in own - files(server)}
    after = on_disk(server)
    assert len(gone) >= 3 and b"somebody-with-a-secret" not in after
    for name in gone:
        assert bytes.fromhex(name) in before and bytes.fromhex(name) not in after
        assert name.encode() not in after


def on_disk(server: Server) -> bytes:
    """Every byte under the state directory."""
    everything = (path for path in server.state_dir.rglob("*") if path.is_file())
    return b"".join(path.read_bytes() for path in everything)


def files(server: Server) -> set[str]:
    return {path.name for path in (server.state_dir / "blocks").rglob("*.safetensors")}


def test_an_agent_is_warmed(server: Server) -> None:
    shown = talk(server, "warm", LONG, "Hello!")
    warmed = post(server, "/warm/warm")
    assert warmed.status_code == 200
    assert warmed.json()["tiers"] == {"memory": shown["tokens"], "disk": shown["tokens"]}


@pytest.mark.requirement("B-15")
@pytest.mark.parametrize("verb", ["fork", "rewind", "pin", "unpin", "warm", "export"])
def test_verbs_need_an_agent_that_is_known(server: Server, verb: str) -> None:
    body = {"fork": {"name": "x"}, "rewind": {"tokens": 1}}.get(verb)
    method = "GET" if verb == "export" else "POST"
    assert code(call(server, method, f"/nobody/{verb}", body)) == (404, "agent_not_found")


@pytest.mark.parametrize(
    ("verb", "body", "param"),
    [
        ("fork", None, "name"),
        ("fork", {"name": ""}, "name"),
        ("fork", {"name": 1}, "name"),
        ("fork", {"name": "a/b"}, "name"),
        ("fork", {"name": "a", "haed": "1"}, "haed"),
        ("fork", {"name": "a", "head": 1}, "head"),
        ("rewind", {}, "tokens"),
        ("rewind", {"tokens": 1, "turn": 1}, "tokens"),
        ("rewind", {"tokens": 0}, "tokens"),
        ("rewind", {"tokens": True}, "tokens"),
        ("rewind", {"turn": 0}, "turn"),
        ("rewind", {"turn": 1.0}, "turn"),
        ("pin", {"pinned": True}, "pinned"),
        ("warm", {"tokens": 1}, "tokens"),
    ],
)
def test_a_wrong_body_names_its_field(server: Server, verb: str, body: object, param: str) -> None:
    server.ask("Hello!", agent="ann")
    answer = post(server, f"/ann/{verb}", body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_a_head_that_is_not_there(server: Server) -> None:
    talk(server, "heads", "Hello!")
    for verb, body in (("fork", {"name": "x"}), ("rewind", {"tokens": 1})):
        answer = post(server, f"/heads/{verb}", {**body, "head": "999999"})
        assert code(answer) == (404, "head_not_found")


@pytest.mark.requirement("B-18")
def test_names_that_look_like_paths(server: Server) -> None:
    talk(server, "import", "Hello!")
    assert call(server, "GET", "/import").json()["id"] == "import"
    assert post(server, "/import/fork", {"name": "fork"}).status_code == 201
    assert post(server, "/fork/fork", {"name": "export"}).status_code == 201
    assert call(server, "GET", "/export").json()["id"] == "export"
    assert call(server, "GET", "/export/export").headers["content-type"] == "application/x-tar"
    for path in ("/import%2Ffork", "/a%2Fb/fork", "/%2e%2e/fork", "/a%20b/fork"):
        assert code(post(server, path, {"name": "x"})) == (400, "invalid_agent_id")
    assert code(call(server, "DELETE", "/import/fork")) == (400, "invalid_agent_id")
    for name in ("import", "fork", "export"):
        assert call(server, "DELETE", f"/{name}").status_code == 204


def test_an_agent_that_is_being_answered_is_not_deleted(server: Server) -> None:
    body, headers = chat(ENDLESS, stream=True), {"X-Agent-ID": "busy"}
    with server.streamed("POST", CHAT, json=body, headers=headers) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        server.wait_until(lambda: server.metric("running") > 0)
        server.ask("Hello!", agent="busy")
        server.wait_until(lambda: call(server, "GET", "/busy").is_success)
        assert code(call(server, "DELETE", "/busy")) == (409, "agent_in_use")
    server.wait_until(lambda: server.metric("running") == 0)
    assert call(server, "DELETE", "/busy").status_code == 204


@pytest.mark.requirement("S-02")
def test_a_page_from_elsewhere_can_do_nothing(server: Server) -> None:
    talk(server, "safe", "Hello!")
    for method, path in (("DELETE", "/safe"), ("POST", "/safe/pin"), ("POST", "/import")):
        headers = {"Origin": "https://evil.example"}
        answer = server.call(method, f"/v1/agents{path}", headers=headers)
        assert code(answer) == (403, "cross_origin")
    assert server.call("POST", "/v1/agents/safe/pin").status_code == 415
