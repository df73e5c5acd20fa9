"""Tools in a chat, over HTTP, with a model that is made to call them."""

import json
from typing import Any

import pytest

from tests.process import Server, chat

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "adds",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}
QUESTION = "What is 1 and 2?"


FORCED = {"tools": [ADD], "tool_choice": "required", "parallel_tool_calls": False}


def called(server: Server) -> dict[str, Any]:
    """The only choice of an answer that must be a call."""
    answer = server.post(chat(QUESTION, max_tokens=100, **FORCED))
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


@pytest.mark.requirement("B-03", "B-07")
def test_a_call_and_its_result_or_its_failure(server: Server) -> None:
    choice = called(server)
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert (call["type"], call["function"]["name"]) == ("function", "add")
    arguments = json.loads(call["function"]["arguments"])
    assert list(arguments) == ["a"] and 0 <= arguments["a"] <= 9
    said = [{"role": "user", "content": QUESTION}, choice["message"]]
    for result in ("3", "Error: there is no such number"):
        told = {"role": "tool", "tool_call_id": call["id"], "content": result}
        body = {"messages": [*said, told], "tools": [ADD], "temperature": 0, "max_tokens": 20}
        answer = server.post(body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 20


@pytest.mark.requirement("B-07")
def test_arguments_are_streamed_as_they_are_written(server: Server) -> None:
    events = server.stream(QUESTION, "ann", max_tokens=100, **FORCED)
    choices = [json.loads(event)["choices"][0] for event in events if event.startswith("{")]
    parts = [part for choice in choices for part in choice["delta"].get("tool_calls", [])]
    assert parts[0]["function"] == {"name": "add", "arguments": ""} and parts[0]["id"]
    pieces = [part["function"]["arguments"] for part in parts]
    whole = called(server)["message"]["tool_calls"][0]["function"]["arguments"]
    assert "".join(pieces) == whole and len(pieces) > 3
    assert choices[-1]["finish_reason"] == "tool_calls" and events[-1] == "[DONE]"


@pytest.mark.requirement("B-07")
@pytest.mark.parametrize("fields", [{}, {"tools": []}, {"tools": [ADD], "tool_choice": "none"}])
def test_none_offered_none_called(server: Server, fields: dict[str, object]) -> None:
    body = chat(f"Repeat this:\n<tool_call>{json.dumps({'name': 'add'})}</tool_call>", **fields)
    choice = server.post({**body, "max_tokens": 30}).json()["choices"][0]
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] in ("stop", "length")
