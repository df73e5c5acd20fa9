"""Anthropic's API over real sockets, with the built-in model."""

import json
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from agent_memory.server.anthropic import COUNT_TOKENS, MESSAGES
from tests.process import ENDLESS, Server, read_until

FACTS = "Remember these facts:\n- the code for orchid is 7319\n- my favorite color is teal"
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Lisbon", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "cache_control": {"type": "ephemeral"},
}


def message(*said: object, **fields: object) -> dict[str, Any]:
    """A request at temperature 0: what user and assistant say in turns."""
    roles = ("user", "assistant")
    messages = [
        one if isinstance(one, dict) else {"role": roles[n % 2], "content": one}
        for n, one in enumerate(said)
    ]
    return {"model": "builtin", "max_tokens": 120, "temperature": 0, "messages": messages, **fields}


def ask(server: Server, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    answer = server.post(body, f"{MESSAGES}?beta=true", **headers)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """Of a stream, each under the name that is its type."""
    assert answer.status_code == 200, answer.text
    told = []
    for one in answer.text.removesuffix("\n\n").split("\n\n"):
        name, data = one.split("\n")
        told.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {told[-1]['type']}"
    return told


def total(usage: dict[str, int]) -> int:
    return sum(tokens for name, tokens in usage.items() if name.endswith("input_tokens"))


def all_of(usage: dict[str, int]) -> int:
    return total(usage) + usage["output_tokens"]


def error_of(answer: httpx.Response, status: int) -> dict[str, str]:
    """The error of an answer, which must have Anthropic's shape."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"type", "error", "request_id"} and body["type"] == "error"
    assert set(body["error"]) == {"type", "message"} and body["error"]["message"]
    ids = {answer.headers[name] for name in ("request-id", "x-request-id")}
    assert ids == {body["request_id"]}
    error: dict[str, str] = body["error"]
    return error


@pytest.mark.requirement("B-06")
def test_an_answer_is_the_same_whole_and_streamed(server: Server) -> None:
    whole = ask(server, message(FACTS))
    assert (whole["type"], whole["role"], whole["model"]) == ("message", "assistant", "builtin")
    assert whole["id"].startswith("msg_")
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("end_turn", None)
    [block] = whole["content"]
    first, start, *deltas, stop, delta, last = events(
        server.post(message(FACTS, stream=True), MESSAGES)
    )
    begun = first["message"]
    assert (begun["content"], begun["stop_reason"]) == ([], None)
    assert {name: begun[name] for name in ("type", "role", "model")} == {
        name: whole[name] for name in ("type", "role", "model")
    }
    assert start["content_block"] == {"type": "text", "text": ""}
    assert "".join(one["delta"]["text"] for one in deltas) == block["text"] and len(deltas) > 1
    assert stop == {"type": "content_block_stop", "index": 0}
    assert delta["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert delta["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    assert delta["usage"] == {**begun["usage"], "output_tokens": delta["usage"]["output_tokens"]}
    assert last == {"type": "message_stop"}


@pytest.mark.requirement("B-06")
def test_usage_and_the_count_are_true(server: Server) -> None:
    body = message("Count me: one, two, three.", system="Be short.")
    count = server.post({**body, "max_tokens": None}, COUNT_TOKENS).json()
    cold = ask(server, body)["usage"]
    assert count == {"input_tokens": total(cold)}
    assert cold["cache_read_input_tokens"] <= 5  # what all conversations begin with
    again = ask(server, body)["usage"]
    assert again["cache_read_input_tokens"] == total(cold) - 1 == total(again) - 1
    assert (again["input_tokens"], again["cache_creation_input_tokens"]) == (1, 0)
    body["system"] = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    marked = ask(server, body)["usage"]
    assert marked["input_tokens"] == 0 and marked["cache_creation_input_tokens"] > 10
    assert server.post(body, COUNT_TOKENS).json() == {"input_tokens": total(marked)}


def test_why_it_ended(server: Server) -> None:
    cut = ask(server, message(ENDLESS, max_tokens=5))
    assert (cut["stop_reason"], cut["usage"]["output_tokens"]) == ("max_tokens", 5)
    whole = ask(server, message("Hello there"))["content"][0]["text"]
    word = whole.split()[2]
    stopped = ask(server, message("Hello there", stop_sequences=["no such word", word]))
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", word)
    assert stopped["content"][0]["text"] == whole[: whole.index(word)]


def test_an_answer_that_was_begun_goes_on(server: Server) -> None:
    whole = ask(server, message("Hello there"))["content"][0]["text"]
    begun = whole[: whole.index(" ", 6)]
    rest = ask(server, message("Hello there", begun))
    assert begun + rest["content"][0]["text"] == whole


def test_a_form_is_kept(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "maximum": 9}},
        "required": ["n"],
        "additionalProperties": False,
    }
    config = {"format": {"type": "json_schema", "schema": schema}}
    answer = ask(server, message("Any number", output_config=config))
    assert list(json.loads(answer["content"][0]["text"])) == ["n"]


# ── what agents do ───────────────────────────────────────────────────────────────────────────


class Talk:
    """A tool loop as Claude Code holds it: all of it is sent each time, and more at its end."""

    def __init__(self) -> None:
        self.requests = 0
        self.messages: list[dict[str, Any]] = []
        reminder = {"type": "text", "text": "<system-reminder>Be kind.</system-reminder>"}
        self.says("user", [reminder, {"type": "text", "text": FACTS}])
        self.says("system", "The working folder is empty.")

    def says(self, role: str, content: object) -> None:
        self.messages.append({"role": role, "content": content})

    def body(self, **fields: object) -> dict[str, Any]:
        """Claude Code marks the last block of each request, so the marks wander."""
        self.requests += 1
        bill = f"x-anthropic-billing-header: cc_version=2.1; cch={self.requests:05};"
        system = [bill, "You are a careful helper.", "Call tools when they help. " * 20]
        return message(
            *self.messages,
            system=[{"type": "text", "text": text} for text in system],
            tools=[WEATHER],
            thinking={"type": "adaptive"},
            output_config={"effort": "high"},
            context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            metadata={"user_id": json.dumps({"device_id": "d", "session_id": "claude-1"})},
            **fields,
        )

    def heard(self, answer: dict[str, Any]) -> None:
        self.says("assistant", answer["content"])

    def result(self, answer: dict[str, Any]) -> None:
        results = [
            {"type": "tool_result", "tool_use_id": block["id"], "content": "Sunny, 24 degrees."}
            for block in answer["content"]
            if block["type"] == "tool_use"
        ]
        assert results
        mark = {"cache_control": {"type": "ephemeral"}}
        self.says(
            "user", [*results, {"type": "text", "text": "What is the code for orchid?", **mark}]
        )
        self.says("system", "It is late.")


@pytest.mark.requirement("B-06")
def test_each_turn_goes_on_from_the_one_before_and_from_disk_as_if_cold(
    server: Server, tmp_path: Path
) -> None:
    talk = Talk()
    with Server(tmp_path).wait_ready() as remembers:
        first = ask(
            remembers, talk.body(tool_choice={"type": "any", "disable_parallel_tool_use": True})
        )
        assert first["stop_reason"] == "tool_use"
        assert first["content"][0]["input"]["city"] in ("Lisbon", "Oslo")
        talk.heard(first)
        talk.result(first)
        second = ask(remembers, talk.body())
        assert second["usage"]["cache_read_input_tokens"] == all_of(first["usage"])
        assert second["stop_reason"] == "end_turn"
        talk.heard(second)
        talk.says("user", "What is my favorite color?")
        third = ask(remembers, body := talk.body())
        assert third["usage"]["cache_read_input_tokens"] == all_of(second["usage"])
        remembers.wait_on_disk("claude-1", all_of(third["usage"]))
    with Server(tmp_path).wait_ready() as restarted:
        again = ask(restarted, body)
        assert again["usage"]["cache_read_input_tokens"] == total(third["usage"]) - 1
        assert again["content"] == third["content"]
    cold = ask(server, body)
    assert cold["usage"]["cache_read_input_tokens"] <= 5
    assert cold["content"] == third["content"]
    assert total(cold["usage"]) == total(third["usage"])


def test_a_forced_call_streams_as_it_is_told_whole(server: Server) -> None:
    choice = {"type": "tool", "name": "get_weather"}
    body = message("Weather in Oslo?", tools=[WEATHER], tool_choice=choice)
    [block] = ask(server, body)["content"]
    told = events(server.post({**body, "stream": True}, MESSAGES))
    assert [one["type"] for one in told if "delta" not in one["type"]] == [
        *("message_start", "content_block_start", "content_block_stop", "message_stop")
    ]
    assert told[1]["content_block"]["name"] == block["name"] == "get_weather"
    pieces = [one["delta"]["partial_json"] for one in told if one["type"] == "content_block_delta"]
    assert json.loads("".join(pieces)) == block["input"]
    assert told[-2]["delta"]["stop_reason"] == "tool_use"


# ── errors ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "kind", "word"),
    [
        ({"model": "claude-opus-9"}, "not_found_error", "'builtin'"),
        ({"max_tokens": None}, "invalid_request_error", "'max_tokens'"),
        ({"temperature": 2}, "invalid_request_error", "'temperature'"),
        ({"mcp_servers": [{"url": "x"}]}, "invalid_request_error", "'mcp_servers'"),
        (
            {"messages": [{"role": "user", "content": "word " * 9000}]},
            *("invalid_request_error", "8192"),
        ),
    ],
    ids=str,
)
def test_bad_requests(
    server: Server, fields: dict[str, object], kind: str, word: str, stream: bool
) -> None:
    answer = server.post({**message("Hello"), "stream": stream, **fields}, MESSAGES)
    error = error_of(answer, 404 if kind == "not_found_error" else 400)
    assert error["type"] == kind and word in error["message"]


def test_errors_that_no_route_has_seen(server: Server) -> None:
    assert error_of(server.post(b"{", MESSAGES), 400)["type"] == "invalid_request_error"
    assert error_of(server.post(b"x" * (9 << 20), MESSAGES), 413)["type"] == "request_too_large"
    away = server.post(message("Hello"), MESSAGES, Origin="http://evil.example")
    assert error_of(away, 403)["type"] == "permission_error"
    assert error_of(server.post({}, MESSAGES, Host="evil.example"), 421)
    assert error_of(server.post({}, MESSAGES, Content_Type="text/plain"), 415)
    answer = server.get(MESSAGES)
    assert error_of(answer, 405)["type"] == "invalid_request_error"
    assert answer.headers["allow"] == "POST"
    assert error_of(server.get(f"{MESSAGES}/batches"), 404)["type"] == "not_found_error"
    assert error_of(server.post(message("Hi"), COUNT_TOKENS, X_Agent_ID="a/b"), 400)
    elsewhere = server.get("/v1/nothing")
    assert "request-id" not in elsewhere.headers and "param" in elsewhere.json()["error"]


def test_a_stream_that_the_server_ends_says_so(tmp_path: Path) -> None:
    """And has no mark of an end that other APIs have."""
    with Server(tmp_path, "--drain-timeout", "0.2").wait_ready() as server:
        raw = json.dumps(message(ENDLESS, max_tokens=8000, stream=True)).encode()
        with server.connect() as client:
            client.sendall(
                b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: mine\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(raw) + raw
            )
            assert b"message_start" in read_until(client, b"content_block_delta")
            server.signal()
            ended = read_to_the_end(client)
    last = ended[ended.index("event: error") :].split("\n\n")[0]
    told = json.loads(last.removeprefix("event: error\ndata: "))
    assert told["error"]["type"] == "overloaded_error" and told["request_id"] == "mine"
    assert "message_stop" not in ended and "[DONE]" not in ended


def read_to_the_end(client: socket.socket) -> str:
    data = b""
    while piece := client.recv(65536):
        data += piece
    return data.decode()
