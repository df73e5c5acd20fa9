"""Items of the Responses API: read, refused by their place, and told to the model."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_memory.errors import BadRequest
from agent_memory.server.response_items import opened, sealed
from tests.server.responses import asked, told, user


def say(role: str, *texts: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "input_text", "text": text} for text in texts]}


def test_messages_of_all_roles() -> None:
    items = [
        say("developer", "be ", "kind"),
        {"type": "message", **say("system", "and brief")},
        user("Hello"),
        {"type": "message", **say("user", "there")},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Hi."}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        say("developer", "now be rude"),
        {"role": "user", "content": [{"type": "text", "text": "Go on"}]},
    ]
    assert told(asked(input=items, instructions="First")).messages == [
        {"role": "system", "content": "First\n\nbe kind\n\nand brief"},
        {"role": "user", "content": "Hello\n\nthere"},
        {"role": "assistant", "content": "Hi."},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "now be rude\n\nGo on"},
    ]


def call(number: int, arguments: str = "{}", **more: str) -> dict[str, Any]:
    own = {"type": "function_call", "call_id": f"c{number}", "name": "add"}
    return {**own, "arguments": arguments, **more}


def output(number: int, value: object) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": f"c{number}", "output": value}


def test_one_answer_is_one_message_whatever_it_was_made_of() -> None:
    thought = {"type": "reasoning", "id": "rs_1", "summary": []}
    items = [
        user("2+2?"),
        {**thought, "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"role": "assistant", "content": "I add."},
        call(1, '{"a": 2}'),
        call(2, "{odd", namespace="math"),
        output(1, "4"),
        output(2, [{"type": "input_text", "text": "4"}, {"type": "input_text", "text": "!"}]),
        {**thought, "encrypted_content": sealed("so")},
        {"role": "assistant", "content": "4"},
    ]
    first, second, *outputs, last = told(asked(input=items)).messages
    assert first == user("2+2?")
    assert (second["reasoning_content"], second["content"]) == ("hm", "I add.")
    functions = [each["function"] for each in second["tool_calls"]]
    assert functions == [
        {"name": "add", "arguments": {"a": 2}},
        {"name": "math__add", "arguments": "{odd"},
    ]
    assert outputs == [
        {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "4"},
        {"role": "tool", "tool_call_id": "c2", "name": "math__add", "content": "4!"},
    ]
    assert last == {"role": "assistant", "content": "4", "reasoning_content": "so"}


@pytest.mark.parametrize(
    ("item", "thought"),
    [
        ({"summary": [{"type": "summary_text", "text": "short"}]}, "short"),
        (
            {"content": [{"type": "reasoning_text", "text": "long"}], "summary": [{"text": "s"}]},
            "long",
        ),
        ({"encrypted_content": sealed("whole"), "content": [{"text": "shown"}]}, "whole"),
        ({"encrypted_content": "gAAAAAB of others", "summary": [{"text": "short"}]}, "short"),
        ({"encrypted_content": "am1.?", "summary": None}, ""),
    ],
    ids=str,
)
def test_a_thought_comes_back_as_far_as_it_can_be_read(item: dict[str, Any], thought: str) -> None:
    (message,) = told(asked(input=[{"type": "reasoning", **item}])).messages
    assert message["reasoning_content"] == thought


@given(st.text())
def test_what_is_sealed_is_opened(text: str) -> None:
    assert opened(sealed(text)) == text


@pytest.mark.parametrize(
    ("item", "place"),
    [
        ("hi", ""),
        ({}, ".id"),
        ({"type": "image_generation_call"}, ".type"),
        ({"type": 5}, ".type"),
        ({"role": "tool", "content": "x"}, ".role"),
        ({"type": "message", "content": "x"}, ".role"),
        ({"role": "user"}, ".content"),
        ({"role": "user", "content": [{"type": "input_image"}]}, ".content[0].type"),
        ({"role": "user", "content": [{"type": "input_text"}]}, ".content[0].text"),
        ({"type": "function_call", "name": "a"}, ".call_id"),
        ({"type": "function_call", "name": "a b", "call_id": "c"}, ".name"),
        ({"type": "function_call", "name": "a", "call_id": "c", "arguments": {}}, ".arguments"),
        ({"type": "function_call_output", "output": "x"}, ".call_id"),
        ({"type": "function_call_output", "call_id": "c", "output": 5}, ".output"),
        ({"type": "reasoning", "content": [{}]}, ".content[0].text"),
        ({"type": "item_reference"}, ".id"),
        ({"role": "user", "content": "x", "id": 5}, ".id"),
    ],
    ids=str,
)
def test_a_bad_item_is_named_by_its_place(item: object, place: str) -> None:
    with pytest.raises(BadRequest, match=re.escape(f"'input[1]{place}'")) as caught:
        asked(input=[user("x"), item])
    assert caught.value.param == f"input[1]{place}"
