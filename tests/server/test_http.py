"""The API over real sockets, with the built-in model."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx
import pytest

from tests.process import CHAT, ENDLESS, Server, chat, content

HELLO = "Hello there"


@pytest.mark.requirement("B-01")
def test_it_is_alive_and_ready(server: Server) -> None:
    healthy = server.get("/healthz").json()
    assert (healthy["status"], healthy["phase"]) == ("ok", "ready")
    assert healthy["engine"]["resting"] and healthy["engine"]["last_turn_age_s"] >= 0
    ready = {"status": "ready", "model": "builtin", "models": {"builtin": {"status": "ready"}}}
    assert server.get("/readyz").json() == ready


@pytest.mark.requirement("B-02", "L-09")
def test_models(server: Server) -> None:
    listed = server.get("/v1/models").json()
    assert listed["object"] == "list"
    first = listed["data"][0]
    assert (first["id"], first["object"], first["context_length"]) == ("builtin", "model", 8192)
    assert first["kv"]["bits"] == 8
    assert server.get("/v1/models/builtin").json() == first
    assert error_of(server.get("/v1/models/other/one"), 404)["code"] == "model_not_found"


def error_of(answer: httpx.Response, status: int) -> dict[str, object]:
    """The error of an answer, which must have OpenAI's shape."""
    assert answer.status_code == status, answer.text
    (name,) = answer.json()
    error: dict[str, object] = answer.json()[name]
    assert name == "error" and set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"] in ("invalid_request_error", "server_error")
    return error


@pytest.mark.requirement("B-03", "B-04")
def test_an_answer_is_the_same_whole_and_streamed(server: Server) -> None:
    whole = server.ask(HELLO, agent="both").json()
    message, usage = whole["choices"][0]["message"], whole["usage"]
    assert whole["object"] == "chat.completion" and whole["model"] == "builtin"
    assert re.fullmatch("chatcmpl-[0-9a-f]{32}", whole["id"])
    assert abs(whole["created"] - time.time()) < 60
    assert [choice["finish_reason"] for choice in whole["choices"]] == ["stop"]
    assert message["role"] == "assistant" and message["content"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]

    events = server.stream(HELLO, agent="both", stream_options={"include_usage": True})
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert content(events) == message["content"]
    assert sum(bool(content([event])) for event in events) > 3
    assert chunks[-2]["choices"][0] == {
        "index": 0,
        "delta": {},
        "finish_reason": "stop",
        "logprobs": None,
    }
    assert chunks[-1]["choices"] == []
    again = chunks[-1]["usage"]
    assert again["completion_tokens"] == usage["completion_tokens"]
    assert again["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1


def test_usage_is_sent_only_when_asked_for(server: Server) -> None:
    for options in (None, {}, {"include_usage": False}):
        events = server.stream(HELLO, stream_options=options)
        assert not any("usage" in event for event in events)


@pytest.mark.requirement("B-03", "B-07")
def test_limits_and_stops(server: Server) -> None:
    short = server.ask(ENDLESS, max_completion_tokens=5).json()
    assert short["choices"][0]["finish_reason"] == "length"
    assert short["usage"]["completion_tokens"] == 5
    whole = server.ask(HELLO).json()["choices"][0]["message"]["content"]
    word = whole.split()[2]
    cut = server.ask(HELLO, stop=[word]).json()["choices"][0]
    assert cut["message"]["content"] == whole[: whole.index(word)]
    assert cut["finish_reason"] == "stop"


def test_a_seed_repeats_an_answer(server: Server) -> None:
    asked = [server.ask("The", temperature=1.5, seed=7, max_tokens=20).json() for _ in range(2)]
    first, second = (answer["choices"][0]["message"]["content"] for answer in asked)
    assert first == second


@pytest.mark.requirement("B-02")
@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"model": "other"}, "model", "model_not_found"),
        ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
        ({"n": 99}, "n", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"top_k": 1_000_000}, "top_k", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_field(
    server: Server, fields: dict[str, object], param: str, code: str, stream: bool
) -> None:
    answer = server.post({**chat(HELLO), "stream": stream, **fields})
    error = error_of(answer, 404 if code == "model_not_found" else 400)
    assert (error["param"], error["code"]) == (param, code)


@pytest.mark.requirement("L-09")
def test_a_prompt_too_long(server: Server) -> None:
    for stream in (False, True):
        error = error_of(server.ask("word " * 9000, stream=stream), 400)
        assert error["code"] == "context_length_exceeded"
        prompt, context = map(int, re.findall(r"\d+", str(error["message"])))
        assert prompt > 9000 and context == 8192


@pytest.mark.requirement("B-02")
@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[1]", b'{"messages": NaN}', b'{"user": "\\ud800"}', b"[" * 100_000, b"\xff\xfe"],
    ids=repr,
)
def test_a_body_that_is_no_json_changes_nothing(server: Server, raw: bytes) -> None:
    before = server.get("/v1/agents").json()
    assert error_of(server.post(raw), 400)["code"] == "invalid_json"
    assert server.get("/v1/agents").json() == before


@pytest.mark.requirement("B-18", "S-01", "S-02")
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "localhost"}, 200),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Authorization": "Bearer whatever"}, 200),
        ({"X-Agent-ID": "a/b"}, 400),
    ],
    ids=str,
)
def test_headers_let_in_or_not(server: Server, headers: dict[str, str], status: int) -> None:
    before = server.get("/v1/agents").json()
    answer = server.post(chat(HELLO, max_tokens=1), **headers)
    assert answer.status_code == status, answer.text
    assert not [name for name in answer.headers if name.startswith("access-control")]
    if status != 200:
        error_of(answer, status)
        assert server.get("/v1/agents").json() == before


@pytest.mark.requirement("B-02", "S-02")
def test_unknown_paths_and_methods(server: Server) -> None:
    assert error_of(server.get("/v1/nothing"), 404)["code"] == "not_found"
    assert error_of(server.get("/v1/agents/ann/"), 400)
    answer = server.get(CHAT)
    assert error_of(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["allow"] == "POST"
    asked_before = server.call("OPTIONS", CHAT, headers={"Origin": "http://localhost:3000"})
    assert error_of(asked_before, 405) and "access-control-allow-origin" not in asked_before.headers


@pytest.mark.parametrize("path", ["/v1/agents/import", "/v1/files", "/healthz"])
def test_a_line_break_is_part_of_a_path(server: Server, path: str) -> None:
    assert server.post({}, f"{path}%0A").status_code == 404


@pytest.mark.requirement("B-08")
def test_every_answer_has_a_request_id(server: Server) -> None:
    ours = [server.get("/healthz").headers["x-request-id"] for _ in range(2)]
    assert ours[0] != ours[1] and all(re.fullmatch("req-[0-9a-f]{32}", text) for text in ours)
    assert server.post(b"", X_Request_ID="mine-1").headers["x-request-id"] == "mine-1"
    assert server.post(b"", X_Request_ID="no spaces").headers["x-request-id"].startswith("req-")
    for path, status, headers in (
        ("/v1/nothing", 404, {}),
        (CHAT, 405, {}),
        ("/healthz", 421, {"Host": "evil.example"}),
        ("/healthz", 403, {"Origin": "http://evil.example"}),
    ):
        refused = server.call("GET", path, headers=headers)
        assert refused.status_code == status
        assert refused.headers["x-request-id"].startswith("req-")


@pytest.mark.requirement("B-15")
def test_what_agents_have_in_mind(server: Server) -> None:
    used = server.ask("Remember me", agent="ann").json()["usage"]["total_tokens"]
    server.wait_on_disk("ann", used)
    ann = server.get("/v1/agents/ann").json()
    assert ann["tokens"] == used and ann["heads"][0]["tokens"] == used
    listed = server.get("/v1/agents").json()
    assert listed["object"] == "list"
    (entry,) = [agent for agent in listed["data"] if agent["id"] == "ann"]
    assert set(entry) == {
        *("id", "object", "tokens", "tiers", "blocks", "bytes", "bytes_written"),
        *("pinned", "last_used", "heads"),
    }
    assert entry["bytes"] > 0 and entry["tiers"] == {"memory": used, "disk": used}
    assert abs(entry["last_used"] - time.time()) < 60


@pytest.mark.requirement("B-15", "B-18")
def test_agents_that_are_not_there(server: Server) -> None:
    assert error_of(server.get("/v1/agents/nobody"), 404)["code"] == "agent_not_found"
    for name in ("a%2Fb", "..%2F", "%20", "a" * 201):
        assert error_of(server.get(f"/v1/agents/{name}"), 400)["code"] == "invalid_agent_id"


def test_an_odd_session_has_a_name_all_the_same(server: Server) -> None:
    assert server.post(chat(HELLO), X_Session_ID="../../etc").status_code == 200
    server.wait_until(
        lambda: re.search('"x-[0-9a-f]{32}"', server.get("/v1/agents").text) is not None
    )


@pytest.mark.requirement("B-08", "S-27")
def test_a_request_leaves_one_line_and_no_prompt(server: Server) -> None:
    server.post(chat("tell of nasturtiums"), X_Agent_ID="log", X_Request_ID="log-1")
    (line,) = [e for e in server.events("request_done") if e["request_id"] == "log-1"]
    assert line["agent"] == "log" and line["finish"] == "stop"
    assert line["prompt_tokens"] > 0 and line["completion_tokens"] > 0
    assert 0 < line["ttft_ms"] <= line["total_ms"]
    assert "nasturtium" not in server.log()


def test_a_priority_that_is_none_is_named(server: Server) -> None:
    refused = server.post(chat(HELLO), X_Priority="urgent")
    assert error_of(refused, 400)["param"] == "X-Priority"
    assert error_of(server.ask(HELLO, priority=5), 400)["param"] == "priority"
    answer = server.post(chat(HELLO, priority="interactive"), X_Priority="background")
    assert answer.status_code == 200


def is_known(server: Server, name: str) -> bool:
    return server.get(f"/v1/agents/{name}").status_code == 200


@pytest.mark.requirement("B-05")
def test_a_name_comes_from_a_header_or_the_body_or_there_is_none(server: Server) -> None:
    for headers, fields, name in (
        ({"X-Agent-ID": "by-header"}, {"user": "not-this"}, "by-header"),
        ({"X-Session-ID": "by-session"}, {}, "by-session"),
        ({}, {"prompt_cache_key": "by-key"}, "by-key"),
        ({}, {"user": "by-user"}, "by-user"),
    ):
        assert server.post(chat(HELLO, **fields), **headers).status_code == 200
        server.wait_until(partial(is_known, server, name))
    assert server.get("/v1/agents/not-this").status_code == 404
    before = {agent["id"] for agent in server.get("/v1/agents").json()["data"]}
    assert server.post(chat(HELLO)).status_code == 200
    assert {agent["id"] for agent in server.get("/v1/agents").json()["data"]} == before


@pytest.mark.requirement("B-11")
def test_metrics_count_requests_times_and_bytes_and_not_themselves(server: Server) -> None:
    def counted() -> list[float]:
        names = (
            'requests_total{reason="stop"}',
            "time_to_first_token_seconds_count",
            "generated_tokens_total",
        )
        return [server.metric(name) for name in names]

    def all_requests() -> float:
        lines = server.get("/metrics").text.splitlines()
        name = "agent_memory_requests_total{"
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    before, all_before = counted(), all_requests()
    usage = server.ask("Count me", agent="counted").json()["usage"]
    server.wait_until(lambda: counted()[0] == before[0] + 1)
    assert counted() == [before[0] + 1, before[1] + 1, before[2] + usage["completion_tokens"]]
    server.wait_until(lambda: server.metric("pool_bytes") > 0)
    assert all_requests() == all_requests() == all_before + 1


@pytest.mark.requirement("L-17")
def test_a_long_text_keeps_nobody_waiting(server: Server) -> None:
    """4 MB of it, which is read while the event loop goes on."""
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.ask, "word " * 800_000)
        waits = []
        while not asked.done():
            began = time.monotonic()
            assert server.get("/healthz").status_code == 200
            waits.append(time.monotonic() - began)
        assert error_of(asked.result(), 400)["code"] == "context_length_exceeded"
    assert len(waits) > 5 and max(waits) < 1
