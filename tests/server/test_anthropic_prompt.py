"""Conversations and tools as Anthropic has them: what templates are given, and what is refused by
which name."""

import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_memory.errors import BadRequest
from agent_memory.model.forms import Tool
from agent_memory.server.anthropic_messages import NOT_BUILT, parse
from agent_memory.server.ask import Calls
from tests.server.anthropics import HELLO, asking, assistant, said, text, told, user

USE = {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "2"}
CALLED = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "t1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    ],
}
ANSWERED = {"role": "tool", "content": "2", "tool_call_id": "t1", "name": "add"}

# ── whatever comes ───────────────────────────────────────────────────────────────────────────

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
FIELDS = (
    "model max_tokens temperature top_p top_k stop_sequences stream system tools tool_choice "
    "thinking output_config output_format metadata priority content cache_control"
).split()
KINDS = "text thinking redacted_thinking tool_use tool_result image document".split()
INSIDE = "text thinking data id name input tool_use_id content is_error cache_control".split()
BLOCK = st.builds(
    lambda kind, more: {**more, "type": kind},
    st.sampled_from(KINDS),
    st.dictionaries(st.sampled_from(INSIDE), ANYTHING | st.text()),
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"])},
    optional={"content": st.text() | st.lists(BLOCK, max_size=4) | ANYTHING},
)
BODY = st.dictionaries(st.sampled_from([*FIELDS, *NOT_BUILT]), ANYTHING)


@given(BODY, st.lists(MESSAGE, max_size=5) | ANYTHING)
def test_whatever_comes_is_a_request_or_a_bad_request(body: dict[str, Any], messages: Any) -> None:
    for given_messages in (messages, [HELLO]):
        try:
            request = parse({"max_tokens": 9, **body, "messages": given_messages}, {})
        except BadRequest as error:
            assert error.param and (f"'{error.param}'" in error.message or error.param in str(body))
        else:
            roles = [message["role"] for message in said(request).messages]
            assert roles and "system" not in roles[1:]
            assert not any(a == b != "tool" for a, b in zip(roles, roles[1:], strict=False))


@given(st.lists(MESSAGE, min_size=1, max_size=6))
def test_what_was_said_stays_where_it_was_whatever_comes_later(messages: list[Any]) -> None:
    """But for the last message: its role may go on with it, at its end."""
    try:
        whole, *shorter = (told(*messages[:n]) for n in range(len(messages), 0, -1))
    except BadRequest:
        return
    for fewer in shorter:
        n = len(fewer) - 1
        assert whole[:n] == fewer[:n]
        assert whole[n]["content"].startswith(fewer[n]["content"])


# ── messages ─────────────────────────────────────────────────────────────────────────────────


def test_the_system_prompt() -> None:
    assert told(HELLO, system="Be kind.") == [{"role": "system", "content": "Be kind."}, HELLO]
    blocks = [text("Be kind.", cache_control={"type": "ephemeral"}), text("Be short.")]
    assert told(HELLO, system=blocks)[0]["content"] == "Be kind.\nBe short."
    for nothing in (None, "", [], [text("")]):
        expected = [{"role": "system", "content": ""}] if nothing not in (None, []) else []
        assert told(HELLO, system=nothing) == [*expected, HELLO]


def test_what_claude_code_bills_by_is_no_prompt() -> None:
    header = text("x-anthropic-billing-header: cc_version=2.1.197; cch=8c21f;")
    assert told(HELLO, system=[header, text("Be kind.")])[0]["content"] == "Be kind."
    assert told(HELLO, system=[header]) == [HELLO]


def test_system_messages_stay_where_they_are() -> None:
    be = {"role": "system", "content": "Be kind."}
    late = {"role": "system", "content": [text("It is late.")]}
    marked = "<system>\nIt is late.\n</system>"
    assert told(be, HELLO, late) == [be, {"role": "user", "content": f"Hello\n{marked}"}]
    assert told(be, HELLO, system="First.")[0]["content"] == "First.\nBe kind."
    assert told(HELLO, assistant(text("Hi")), late, HELLO)[1:] == [
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": f"{marked}\nHello"},
    ]


def test_a_tool_loop() -> None:
    thought = {"type": "thinking", "thinking": "hm", "signature": "x"}
    hidden = {"type": "redacted_thinking", "data": "x"}
    loop = [
        HELLO,
        assistant(thought, hidden, text("I add."), USE, {**USE, "id": "t2", "name": "sub"}),
        user(RESULT, {"type": "tool_result", "tool_use_id": "t2"}, text("Go"), text("on")),
    ]
    _, called, *after = told(*loop)
    assert (called["content"], called["reasoning_content"]) == ("I add.", "hm")
    assert [call["function"]["name"] for call in called["tool_calls"]] == ["add", "sub"]
    assert after == [
        ANSWERED,
        {"role": "tool", "content": "", "tool_call_id": "t2", "name": "sub"},
        {"role": "user", "content": "Go\non"},
    ]


def test_results_come_right_behind_their_calls() -> None:
    assert told(HELLO, assistant(USE), user(text("Here."), RESULT))[1:] == [
        CALLED,
        ANSWERED,
        {"role": "user", "content": "Here."},
    ]


@pytest.mark.parametrize(
    ("result", "content"),
    [
        ({"content": "a"}, "a"),
        ({"content": [text("a"), text("b")]}, "a\nb"),
        ({"content": "no such file", "is_error": True}, "Error: no such file"),
        ({"content": None}, ""),
    ],
    ids=str,
)
def test_results(result: dict[str, Any], content: str) -> None:
    block = {"type": "tool_result", "tool_use_id": "t9", **result}
    assert told(HELLO, user(block))[1] == {"role": "tool", "content": content, "tool_call_id": "t9"}


def test_neighbours_of_one_role_are_one_message() -> None:
    assert told(HELLO, user(text("there"))) == [{"role": "user", "content": "Hello\nthere"}]
    assert told(HELLO, assistant(), assistant(USE), user(RESULT))[1:] == [CALLED, ANSWERED]
    two = told(HELLO, assistant(text("I add."), USE), assistant({**USE, "id": "t2"}), user(RESULT))
    assert two[1]["content"] == "I add." and len(two[1]["tool_calls"]) == 2


@pytest.mark.parametrize(
    ("message", "place"),
    [
        ("hi", ""),
        ({}, ".role"),
        ({"role": "tool", "content": "x"}, ".role"),
        ({"role": "user"}, ".content"),
        (user(), ".content"),
        ({"role": "assistant", "content": 5}, ".content"),
        (user("x"), ".content[0]"),
        (user({}), ".content[0].type"),
        (user(text("a"), {"type": "image", "source": {}}), ".content[1].type"),
        (user({"type": "document"}), ".content[0].type"),
        (user({"type": 5}), ".content[0].type"),
        (user(USE), ".content[0].type"),
        (assistant(RESULT), ".content[0].type"),
        ({"role": "system", "content": [RESULT]}, ".content[0].type"),
        (user({"type": "text"}), ".content[0].text"),
        (assistant({"type": "thinking"}), ".content[0].thinking"),
        (assistant({**USE, "id": 5}), ".content[0].id"),
        (assistant({**USE, "name": None}), ".content[0].name"),
        (assistant({**USE, "input": "{}"}), ".content[0].input"),
        (user({"type": "tool_result"}), ".content[0].tool_use_id"),
        (user({**RESULT, "content": 5}), ".content[0].content"),
        (user({**RESULT, "content": [{"type": "image"}]}), ".content[0].content[0].type"),
        (user({**RESULT, "is_error": "yes"}), ".content[0].is_error"),
    ],
    ids=str,
)
def test_a_bad_message_is_named_by_its_place(message: object, place: str) -> None:
    with pytest.raises(BadRequest, match=re.escape(f"'messages[1]{place}'")) as caught:
        asking(HELLO, message)
    assert caught.value.param == f"messages[1]{place}"


def test_an_answer_may_be_begun() -> None:
    begun = said(asking(HELLO, assistant(text("Hi"))))
    assert begun.goes_on and begun.messages[1] == {"role": "assistant", "content": "Hi"}
    assert not said(asking(HELLO)).goes_on


@pytest.mark.parametrize(
    ("last", "fields", "place"),
    [
        (assistant(), {}, "messages[1].content"),
        (assistant(text("Hi ")), {}, "messages[1].content"),
        (assistant(text("Hi"), USE), {}, "messages[1]"),
        (
            assistant(text("Hi")),
            {"output_config": {"format": {"type": "json_schema", "schema": {}}}},
            "messages",
        ),
        (
            assistant(text("Hi")),
            {"tools": [{"name": "add", "input_schema": {}}], "tool_choice": {"type": "any"}},
            "messages",
        ),
    ],
    ids=str,
)
def test_an_answer_that_cannot_go_on(last: object, fields: dict[str, Any], place: str) -> None:
    with pytest.raises(BadRequest) as caught:
        asking(HELLO, last, **fields)
    assert caught.value.param == place


# ── tools ────────────────────────────────────────────────────────────────────────────────────

ADD = {"name": "add", "description": "adds", "input_schema": {"type": "object"}, "strict": True}
SUB = {"type": "custom", "name": "sub", "input_schema": {}, "cache_control": {}}
BOTH = (Tool("add", {"type": "object"}, strict=True), Tool("sub", {}))


@pytest.mark.parametrize(
    ("choice", "calls"),
    [
        (None, Calls(BOTH)),
        ({"type": "auto"}, Calls(BOTH)),
        ({"type": "auto", "disable_parallel_tool_use": True}, Calls(BOTH, several=False)),
        ({"type": "any"}, Calls(BOTH, must=True)),
        (
            {"type": "any", "disable_parallel_tool_use": True},
            Calls(BOTH, must=True, several=False),
        ),
        ({"type": "tool", "name": "sub"}, Calls(BOTH[1:], must=True, several=False)),
        ({"type": "none"}, Calls()),
    ],
    ids=str,
)
def test_tools_and_who_chooses(choice: object, calls: Calls) -> None:
    request = asking(tools=[ADD, SUB], tool_choice=choice)
    assert request.ask.calls == calls
    add = {"name": "add", "description": "adds", "parameters": {"type": "object"}}
    assert said(request).tools == [  # whatever is chosen: the prompt begins with them
        {"type": "function", "function": add},
        {"type": "function", "function": {"name": "sub", "parameters": {}}},
    ]


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": ["x"]}, "tools[0]"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ({"tools": [{**ADD, "name": "a b"}]}, "tools[0].name"),
        ({"tools": [{**ADD, "name": None}]}, "tools[0].name"),
        ({"tools": [{**ADD, "description": 5}]}, "tools[0].description"),
        ({"tools": [{"name": "add"}]}, "tools[0].input_schema"),
        ({"tools": [ADD, SUB, ADD]}, "tools[2]"),
        ({"tools": [ADD], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"name": "add"}}, "tool_choice.type"),
        ({"tools": [ADD], "tool_choice": {"type": "required"}}, "tool_choice.type"),
        ({"tools": [ADD], "tool_choice": {"type": "tool", "name": "sub"}}, "tool_choice.name"),
        ({"tools": [], "tool_choice": {"type": "any"}}, "tool_choice.type"),
    ],
    ids=str,
)
def test_a_bad_tool_is_named_by_its_place(fields: dict[str, Any], place: str) -> None:
    with pytest.raises(BadRequest) as caught:
        asking(**fields)
    assert caught.value.param == place


@pytest.mark.requirement("S-10")
def test_many_messages_take_no_time_of_others() -> None:
    """The event loop reads them."""
    began = time.process_time()
    (message, _) = told(*([assistant(USE)] * 50_000), HELLO)
    assert len(message["tool_calls"]) == 50_000
    assert time.process_time() - began < 10
