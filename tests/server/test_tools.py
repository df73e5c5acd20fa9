"""Chats with tools, forms, several answers and logprobs, over real sockets."""

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from agent_memory import builtin
from tests.cold import ColdOf
from tests.process import Server, chat

PLACE = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["city", "days", "unit"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells the weather.", "parameters": PLACE},
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
FORCED: dict[str, Any] = {"tool_choice": "required", "parallel_tool_calls": False}
ONE: dict[str, Any] = {"tools": [WEATHER, CLOCK], **FORCED}
ASKED = "What is the weather in Paris?"


def answered(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def check_place(text: str) -> None:
    place = json.loads(text)
    assert set(place) == {"city", "days", "unit"} and len(place["city"]) <= 8
    assert 1 <= place["days"] <= 9 and place["unit"] in ("C", "F")


@pytest.mark.requirement("B-03", "B-07")
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_call_by_name_has_arguments_of_its_schema(server: Server, temperature: float) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    fields: dict[str, Any] = {**ONE, "tool_choice": named, "seed": 3, "temperature": temperature}
    choice = answered(server.ask(ASKED, **fields))
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    [call] = choice["message"]["tool_calls"]
    assert call["type"] == "function" and call["function"]["name"] == "weather"
    check_place(call["function"]["arguments"])


@pytest.mark.requirement("B-07")
def test_a_streamed_call_is_the_whole_one_in_pieces(server: Server) -> None:
    fields: dict[str, Any] = {**ONE, "tools": [WEATHER]}
    whole = answered(server.ask(ASKED, **fields))["message"]["tool_calls"][0]["function"]
    events = [json.loads(event) for event in server.stream(ASKED, **fields)[:-1]]
    deltas = [event["choices"][0]["delta"] for event in events]
    [*pieces] = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert pieces[0]["id"].startswith("call_") and pieces[0]["type"] == "function"
    assert pieces[0]["function"]["name"] == whole["name"]
    assert all(piece["index"] == 0 and "id" not in piece for piece in pieces[1:])
    texts = [piece["function"]["arguments"] for piece in pieces]
    assert "".join(texts) == whole["arguments"] and len(texts) > 3
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert not any(delta.get("content") for delta in deltas)


@pytest.mark.requirement("B-07")
def test_several_calls_in_one_answer(server: Server) -> None:
    """The built-in model would rather end after one."""
    endless = {"max_tokens": 100, "logit_bias": {"2": -100}, "tool_choice": "required"}
    choice = answered(server.ask(ASKED, agent=None, tools=[CLOCK], **endless))
    calls = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "length" and len(calls) > 1
    assert all(isinstance(json.loads(call["function"]["arguments"]), dict) for call in calls[:-1])
    assert len({call["id"] for call in calls}) == len(calls)


@pytest.mark.requirement("B-07")
def test_a_tool_loop_goes_on_from_memory_as_computed_cold(server: Server, cold: ColdOf) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": ASKED}]
    first = server.post({**chat("", **ONE), "messages": messages}, **{"X-Agent-ID": "loop"}).json()
    called = first["choices"][0]["message"]
    result = {
        "role": "tool",
        "tool_call_id": called["tool_calls"][0]["id"],
        "content": "Sunny.",
    }
    fields = {"tools": ONE["tools"], "max_tokens": 100}
    again = {**chat("", **fields), "messages": [*messages, called, result]}
    second = server.post(again, **{"X-Agent-ID": "loop"}).json()
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= first["usage"]["prompt_tokens"]
    failed = {**result, "content": "Error: there is no such place."}
    told = {**again, "messages": [*messages, called, failed], "max_tokens": 5}
    assert server.post(told).status_code == 200
    computed = cold(8).answer(again["messages"], **fields)
    assert second["choices"][0]["message"] == computed.message


@pytest.mark.requirement("B-07")
def test_none_offered_none_called_and_the_prompt_is_the_same(server: Server) -> None:
    usage = [
        server.ask(ASKED, tools=ONE["tools"], tool_choice=choice, max_tokens=1).json()["usage"]
        for choice in ("auto", "none")
    ]
    assert usage[0]["prompt_tokens"] == usage[1]["prompt_tokens"]
    wanted = 'Repeat this:\n<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
    offered: list[dict[str, Any]] = [{}, {"tools": []}, {"tools": [CLOCK], "tool_choice": "none"}]
    for fields in offered:
        choice = answered(server.post(chat(wanted, max_tokens=30, **fields)))
        assert "tool_calls" not in choice["message"]
        assert choice["finish_reason"] in ("stop", "length")


PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def test_a_template_without_place_for_tools(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(builtin.PATH, model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": PLAIN}))
    with Server(tmp_path, "--model", str(model)) as server:
        server.wait_ready()
        refused = server.ask("Hi", tools=[CLOCK])
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "tools"
        fields: dict[str, Any] = {"tools": [CLOCK], "tool_choice": "none", "max_tokens": 1}
        assert "tool_calls" not in answered(server.ask("Hi", **fields))["message"]


def test_json_of_a_schema_or_it_says_length(server: Server) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "p", "schema": PLACE, "strict": True}}
    choice = answered(server.ask("Where?", response_format=form))
    assert choice["finish_reason"] == "stop"
    check_place(choice["message"]["content"])
    cut = answered(server.ask("Where?", response_format=form, max_tokens=5))
    assert cut["finish_reason"] == "length"
    loose = answered(
        server.ask("Where?", response_format={"type": "json_object"}, max_tokens=200, seed=1)
    )
    if loose["finish_reason"] == "stop":
        assert isinstance(json.loads(loose["message"]["content"]), dict)


def test_a_form_or_calls(server: Server) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "p", "schema": PLACE, "strict": True}}
    choice = answered(server.ask("Where?", response_format=form, tools=[CLOCK]))
    message = choice["message"]
    if choice["finish_reason"] == "tool_calls":
        assert message["tool_calls"][0]["function"]["name"] == "clock"
    else:
        check_place(message["content"])


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "("},
        {"type": "integer", "minimum": 5, "maximum": 1},
        {"$ref": "#/$defs/none"},
        {"type": "object", "unevaluatedProperties": False},
    ],
    ids=str,
)
def test_a_strict_schema_that_cannot_be_held_to_is_refused(
    server: Server, schema: dict[str, Any]
) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    answer = server.ask("Where?", response_format=form)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == "invalid_grammar"


def test_several_answers_to_one_prompt(server: Server) -> None:
    asked: dict[str, Any] = {"n": 3, "temperature": 1.2, "seed": 11, "max_tokens": 12}
    long = "Tell me a story. " * 200
    answer = server.ask(long, **asked).json()
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert (
        server.ask(long, **{**asked, "n": 1, "seed": 12}).json()["choices"][0]["message"]["content"]
        == texts[1]
    )
    assert answer["usage"]["completion_tokens"] <= 36
    cached = server.metric('cached_tokens_total{tier="memory"}')
    prompt_tokens = server.ask("Another: " + long, **asked).json()["usage"]["prompt_tokens"]
    cached = server.metric('cached_tokens_total{tier="memory"}') - cached
    assert cached >= 2 * (prompt_tokens - 1)  # two of the three took it from the first


def test_logprobs(server: Server) -> None:
    choice = answered(server.ask("Hello there", logprobs=True, top_logprobs=3))
    told = choice["logprobs"]["content"]
    assert (
        bytes(b for token in told for b in token["bytes"]).decode() == choice["message"]["content"]
    )
    for token in told:
        top = token["top_logprobs"]
        assert len(top) == 3 and top[0]["logprob"] >= top[1]["logprob"] >= top[2]["logprob"]
        assert token["token"] == top[0]["token"]  # temperature 0
    streamed = [
        json.loads(event)["choices"][0]["logprobs"]
        for event in server.stream("Hello there", logprobs=True, top_logprobs=3)[:-1]
    ]
    again = [token for at in streamed if at for token in at["content"]]
    assert [token["bytes"] for token in again] == [token["bytes"] for token in told]
    for one, other in zip(again, told, strict=True):
        assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-4)


def test_bias_and_penalties_change_the_answer(server: Server) -> None:
    plain = answered(server.ask("Hello there", logprobs=True))
    assert plain["logprobs"]["content"]
    forced = answered(server.ask("Hello there", logit_bias={"40": 100}, max_tokens=5))
    assert len(set(forced["message"]["content"])) <= 1
    endless: dict[str, Any] = {"max_tokens": 60, "logit_bias": {"2": -100}}
    free = answered(server.ask("Hello there", **endless))["message"]["content"]
    penalized = answered(server.ask("Hello there", frequency_penalty=2, **endless))
    assert penalized["message"]["content"] != free
    refused = server.ask("Hello there", logit_bias={"999999": 1})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "logit_bias"


def test_an_answer_can_be_made_to_go_on(server: Server) -> None:
    answer = server.ask("Hello there", ignore_eos=True, max_tokens=50).json()
    assert answer["usage"]["completion_tokens"] == 50
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_template_is_told_only_what_it_knows(server: Server) -> None:
    answer = server.ask("Hi", chat_template_kwargs={"enable_thinking": True})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "chat_template_kwargs.enable_thinking"
    assert server.ask("Hi", reasoning_effort="high", max_tokens=1).status_code == 200
