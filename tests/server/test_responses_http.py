"""The Responses API over real sockets, with the built-in model."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from agent_memory.store.documents import response_ids_of
from tests.conftest import ordinary_text
from tests.process import ENDLESS, Server
from tests.server.test_http import error_of

PATH = "/v1/responses"
LONG = "Read this:\n" + ordinary_text()[30_000:32_500]
ADD = {
    "type": "function",
    "name": "add",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["a"],
        "additionalProperties": False,
    },
}


def ask(server: Server, said: Any, agent: str | None = None, **fields: Any) -> httpx.Response:
    body = {"input": said, "temperature": 0, "max_output_tokens": 8, **fields}
    return server.post(body, PATH, **({"X-Agent-ID": agent} if agent else {}))


def answered(server: Server, said: Any, agent: str | None = None, **fields: Any) -> dict[str, Any]:
    answer = ask(server, said, agent, **fields)
    assert answer.status_code == 200, answer.text
    response: dict[str, Any] = answer.json()
    return response


def text(response: dict[str, Any]) -> str:
    return "".join(item["content"][0]["text"] for item in response["output"])


def cached(response: dict[str, Any]) -> int:
    return int(response["usage"]["input_tokens_details"]["cached_tokens"])


def get(server: Server, response_id: str, more: str = "") -> httpx.Response:
    return server.get(f"{PATH}/{response_id}{more}")


def events_of(server: Server, said: str, **fields: Any) -> list[dict[str, Any]]:
    """Of a stream, each under the name of its type."""
    answer = ask(server, said, stream=True, **fields)
    assert answer.headers["content-type"].startswith("text/event-stream")
    pairs = [event.split("\n") for event in answer.text.strip().split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in pairs]
    assert [f"event: {event['type']}" for event in events] == [name for name, _ in pairs]
    return events


def test_an_answer_is_the_same_whole_streamed_and_kept(server: Server) -> None:
    asked: dict[str, Any] = {
        "metadata": {"a": "b"},
        "instructions": "Be kind.",
        "max_output_tokens": 30,
    }
    whole = answered(server, "Hello there", **asked)
    assert (whole["object"], whole["status"], whole["model"]) == (
        "response",
        "completed",
        "builtin",
    )
    assert text(whole) and whole["metadata"] == {"a": "b"}
    assert whole["instructions"] == "Be kind." and whole["store"]
    assert get(server, whole["id"]).json() == whole

    events = events_of(server, "Hello there", **asked)
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    last = events[-1]["response"]
    assert events[-1]["type"] == "response.completed" and get(server, last["id"]).json() == last
    deltas = [event["delta"] for event in events if event["type"].endswith("text.delta")]
    assert "".join(deltas) == text(last) == text(whole)
    assert cached(last) == whole["usage"]["input_tokens"] - 1
    assert whole.keys() == last.keys() == events[0]["response"].keys()


def test_a_conversation_goes_on_from_what_was_kept(server: Server) -> None:
    first = answered(server, LONG, "ann")
    kept = answered(server, "And then?", "ann", previous_response_id=first["id"])
    whole = first["usage"]["total_tokens"]
    assert whole - 2 <= cached(kept) <= whole  # the last token may end in the mark behind it

    resent = [{"role": "user", "content": LONG}, *first["output"]]
    said = [*resent, {"role": "user", "content": "And then?"}]
    cold = answered(server, said, "ann", store=False)
    assert text(cold) == text(kept)
    assert cold["usage"]["input_tokens"] == kept["usage"]["input_tokens"]
    references = [{"type": "item_reference", "id": first["output"][0]["id"]}, said[-1]]
    named = answered(server, [said[0], *references], "ann")
    assert named["usage"]["input_tokens"] == kept["usage"]["input_tokens"]

    listed = get(server, kept["id"], "/input_items?order=asc").json()
    assert [item["role"] for item in listed["data"]] == ["user", "assistant", "user"]
    assert listed["data"][1] == first["output"][0] and not listed["has_more"]
    newest = get(server, kept["id"], "/input_items?limit=1").json()
    assert newest["data"] == listed["data"][2:] and newest["has_more"]
    next_page = get(server, kept["id"], f"/input_items?limit=2&after={newest['last_id']}").json()
    assert next_page["data"] == listed["data"][1::-1] and not next_page["has_more"]


def test_instructions_are_one_requests_alone(server: Server) -> None:
    first = answered(server, "Hello", instructions=LONG)
    without = answered(server, "And?", previous_response_id=first["id"])
    assert without["instructions"] is None
    assert without["usage"]["input_tokens"] < first["usage"]["input_tokens"]


def test_what_was_kept_is_deleted(server: Server) -> None:
    kept = answered(server, "Hello")["id"]
    assert server.delete(f"{PATH}/{kept}").json() == {
        "id": kept,
        "object": "response",
        "deleted": True,
    }
    for path in (kept, f"{kept}/input_items", "resp_x", "..%2f..%2fVERSION"):
        error_of(get(server, path), 404)
    error_of(server.delete(f"{PATH}/{kept}"), 404)
    error = error_of(ask(server, "x", previous_response_id=kept), 404)
    assert (error["param"], error["code"]) == (
        "previous_response_id",
        "previous_response_not_found",
    )


def test_what_is_not_to_be_kept_is_not(server: Server) -> None:
    response = answered(server, "Hello", store=False)
    assert not response["store"]
    error_of(get(server, response["id"]), 404)
    item = {"type": "item_reference", "id": response["output"][0]["id"]}
    assert error_of(ask(server, [item]), 404)["param"] == "input"


def test_only_what_is_in_the_background_can_be_cancelled(server: Server) -> None:
    kept = answered(server, "Hello")["id"]
    assert error_of(server.post({}, f"{PATH}/{kept}/cancel"), 400)["code"] == "not_in_background"
    error_of(server.post({}, f"{PATH}/resp_x/cancel"), 404)
    error = error_of(ask(server, "Hello", background=True), 400)
    assert (error["param"], error["code"]) == ("background", "unsupported_parameter")


@pytest.mark.parametrize("more", ["?stream=true", "/input_items?limit=0", "/input_items?order=up"])
def test_a_bad_query_is_named(server: Server, more: str) -> None:
    kept = answered(server, "Hello")["id"]
    assert str(error_of(get(server, kept, more), 400)["param"]) in more


def test_a_forced_call_and_what_came_of_it(server: Server) -> None:
    tools = {"tools": [ADD], "tool_choice": {"type": "function", "name": "add"}}
    events = events_of(server, "Add!", max_output_tokens=100, **tools)
    response = events[-1]["response"]
    (call,) = response["output"]
    assert call["type"] == "function_call" and call["name"] == "add"
    assert 1 <= json.loads(call["arguments"])["a"] <= 9
    deltas = [event["delta"] for event in events if event["type"].endswith("arguments.delta")]
    assert "".join(deltas) == call["arguments"]

    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "4"}
    after = answered(server, [output], previous_response_id=response["id"], tools=[ADD])
    total = response["usage"]["total_tokens"]
    assert total - 2 <= cached(after) <= total


def test_an_answer_has_the_form_that_was_asked_for(server: Server) -> None:
    schema = ADD["parameters"]
    form = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    response = answered(server, "Give me a number", text=form, max_output_tokens=50)
    assert 1 <= json.loads(text(response))["a"] <= 9 and response["text"]["format"]["name"] == "x"


def test_logprobs_come_with_the_words(server: Server) -> None:
    include = ["message.output_text.logprobs"]
    response = answered(server, "Hello there", include=include, top_logprobs=2)
    part = response["output"][0]["content"][0]
    assert "".join(each["token"] for each in part["logprobs"]) == part["text"]
    assert all(len(each["top_logprobs"]) == 2 for each in part["logprobs"])


def test_an_answer_that_is_cut_short_is_incomplete(server: Server) -> None:
    response = events_of(server, ENDLESS, max_output_tokens=5)[-1]["response"]
    assert response["status"] == "incomplete" and response["usage"]["output_tokens"] == 5
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}


def test_errors_name_the_fields_as_they_are_called_here(server: Server) -> None:
    error = error_of(ask(server, ordinary_text()[:40_000]), 400)
    assert (error["param"], error["code"]) == ("input", "context_length_exceeded")
    assert error_of(ask(server, "x", model="gpt-9"), 404)["code"] == "model_not_found"
    assert error_of(ask(server, [{"role": "tool"}]), 400)["param"] == "input[0].role"


def test_who_is_deleted_leaves_no_responses(server: Server) -> None:
    gone, other = answered(server, LONG, "gone"), answered(server, "Hello", "other")
    server.wait_until(lambda: server.get("/v1/agents/gone").status_code == 200)
    assert server.delete("/v1/agents/gone").status_code == 204
    error_of(get(server, gone["id"]), 404)
    assert get(server, other["id"]).status_code == 200
    files = server.state_dir / "documents" / "responses"
    assert not [*files.glob(response_ids_of("gone") + "*")]
    error_of(server.delete("/v1/agents/gone"), 404)


def test_responses_may_be_all_that_is_left_of_an_agent(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        kept = answered(server.wait_ready(), "Hello", "ann")["id"]
    for path in (server.state_dir / "blocks").rglob("*.safetensors"):
        path.unlink()
    for path in server.state_dir.glob("index.db*"):
        path.unlink()
    with Server(tmp_path) as server:
        server.wait_ready()
        error_of(server.get("/v1/agents/ann"), 404)
        assert get(server, kept).status_code == 200
        assert server.delete("/v1/agents/ann").status_code == 204
        error_of(get(server, kept), 404)


def test_a_conversation_goes_on_after_a_restart(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        first = answered(server.wait_ready(), LONG, "ann")
        end = cached(answered(server, "And?", "ann", previous_response_id=first["id"]))
    with Server(tmp_path) as server:
        again = answered(server.wait_ready(), "And?", "ann", previous_response_id=first["id"])
        assert cached(again) >= end > 600
        assert server.event("request_done")["cached_disk"] > 256
        cold = answered(server, "And?", "ann", previous_response_id=first["id"])
        assert text(cold) == text(again)


def test_an_answer_that_cannot_be_kept_is_still_given(tmp_path: Path) -> None:
    with Server(tmp_path, "--min-free-bytes", "1000T") as server:
        response = answered(server.wait_ready(), "Hello")
        assert text(response) and not response["store"]
        assert server.event("response_not_kept")["response"] == response["id"]
        error_of(get(server, response["id"]), 404)
        last = events_of(server, "Hello")[-1]["response"]
        assert last["status"] == "completed" and not last["store"]
