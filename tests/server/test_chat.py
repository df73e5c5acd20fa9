"""Chat bodies, read: what arrives, what is refused and by which name."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_memory.errors import BadRequest, ContextLengthExceeded, UnsupportedParameter
from agent_memory.model.answers import CallArguments, CallBegins, Part, Thought, Words
from agent_memory.model.forms import ANY_OBJECT, Form, Tool
from agent_memory.request import Conversation, Priority, SamplingParams
from agent_memory.server import ask, openai
from agent_memory.server.ask import Calls, Usage
from agent_memory.server.chat import NOT_BUILT, ChatRequest, Message, parse

HELLO = [{"role": "user", "content": "Hello"}]


def chat(**fields: object) -> dict[str, Any]:
    return {"messages": HELLO, **fields}


def parse_chat(body: dict[str, Any]) -> ChatRequest:
    return parse(body, {})


def said(request: ChatRequest) -> Conversation:
    assert isinstance(request.ask.prompt, Conversation)
    return request.ask.prompt


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
FIELDS = (
    "model max_tokens temperature top_p seed stop stream stream_options n logprobs top_logprobs "
    "logit_bias frequency_penalty tools tool_choice parallel_tool_calls response_format "
    "reasoning_effort chat_template chat_template_kwargs ignore_eos priority"
).split()
TOOL = st.fixed_dictionaries({"type": st.just("function"), "function": ANYTHING})
MESSAGE = st.dictionaries(
    st.sampled_from(["role", "content", "name", "tool_calls", "tool_call_id"]), ANYTHING
)
BODY = st.dictionaries(st.sampled_from([*FIELDS, *NOT_BUILT]), ANYTHING)


@given(BODY, st.lists(MESSAGE) | ANYTHING)
def test_whatever_comes_is_a_request_or_a_bad_request(body: dict[str, Any], messages: Any) -> None:
    for given_messages in (messages, HELLO):
        try:
            request = parse_chat({**body, "messages": given_messages})
        except BadRequest as error:
            assert error.param and (f"'{error.param}'" in error.message or error.param in str(body))
        else:
            assert said(request).messages


def test_the_least_request() -> None:
    request = parse_chat(chat())
    assert said(request) == Conversation(HELLO, [])
    asked = request.ask
    assert asked.model is None and asked.max_tokens is None and asked.stop == ()
    assert not request.stream and not request.include_usage
    assert (asked.choices, asked.logprobs, asked.form, asked.calls) == (1, None, None, Calls())
    defaults = SamplingParams(0.7, 0.9, 20)
    assert asked.sampling_over(defaults, 0) == defaults


def test_every_parameter_arrives() -> None:
    request = parse_chat(
        chat(
            model="m",
            max_tokens=7,
            temperature=0,
            top_p=1,
            top_k=0,
            min_p=0.5,
            seed=-3,
            stop=["a", "b"],
            stream=True,
            stream_options={"include_usage": True},
            frequency_penalty=-2,
            presence_penalty=0.5,
            logit_bias={"5": -100, "7": 0},
            n=3,
            logprobs=True,
            top_logprobs=20,
            reasoning_effort="low",
            chat_template_kwargs={"enable_thinking": False},
            ignore_eos=True,
            priority="background",
            user="ann",
        )
    )
    asked = request.ask
    assert (asked.model, asked.max_tokens, asked.stop) == ("m", 7, ("a", "b"))
    assert request.stream and request.include_usage
    assert (asked.choices, asked.logprobs, asked.effort) == (3, 20, "low")
    assert (asked.agent, asked.priority) == ("ann", Priority.BACKGROUND)
    assert said(request).options == {"enable_thinking": False} and asked.ignore_end
    assert asked.sampling_over(SamplingParams(1, 0.1, 9), 2) == SamplingParams(
        0, 1, 0, 0.5, -1, -2, 0.5, ((5, -100),)
    )


def test_the_newer_name_of_the_limit_wins() -> None:
    assert parse_chat(chat(max_tokens=7, max_completion_tokens=9)).ask.max_tokens == 9
    assert parse_chat(chat(max_tokens=7, max_completion_tokens=None)).ask.max_tokens == 7


def test_one_stop_may_be_bare() -> None:
    assert parse_chat(chat(stop="END")).ask.stop == ("END",)


@pytest.mark.requirement("B-02", "S-10", "S-12")
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", 5),
        ("messages", None),
        ("messages", []),
        ("messages", {"role": "user"}),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("max_completion_tokens", "10"),
        ("temperature", 2.01),
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.5),
        ("seed", 0.5),
        ("seed", 2**63),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a", 1]),
        ("stop", ["a"] * 17),
        ("stop", "x" * 201),
        ("stop", {"a": 1}),
        ("stream", 1),
        ("stream", "true"),
        ("stream_options", True),
        ("stream_options", []),
        ("n", 0),
        ("n", 17),
        ("n", True),
        ("logprobs", 0),
        ("top_logprobs", 21),
        ("top_logprobs", 1),
        ("frequency_penalty", 2.5),
        ("presence_penalty", "x"),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {str(n): 1 for n in range(1025)}),
        ("logit_bias", [1]),
        ("logit_bias", {"1" * 5000: 1}),
        ("tools", {}),
        ("tool_choice", "required"),
        ("tool_choice", "sometimes"),
        ("tool_choice", {"type": "function", "function": {"name": "unknown"}}),
        ("parallel_tool_calls", "yes"),
        ("response_format", "json"),
        ("reasoning_effort", "most"),
        ("chat_template", "{{ messages }}"),
        ("chat_template_kwargs", []),
        ("priority", "soon"),
    ],
)
def test_a_wrong_value_names_its_field(field: str, value: object) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_chat(chat(**{field: value}))
    assert caught.value.param == field
    assert f"'{field}'" in caught.value.message


@pytest.mark.parametrize("field", NOT_BUILT)
def test_what_would_change_the_answer_is_refused(field: str) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        parse_chat(chat(**{field: {"something": "else"}}))
    assert (caught.value.status, caught.value.code) == (400, "unsupported_parameter")
    assert caught.value.param == field


@pytest.mark.parametrize(
    "fields",
    [{name: value} for name, harmless in NOT_BUILT.items() for value in (None, *harmless)],
    ids=str,
)
def test_what_means_the_default_is_accepted(fields: dict[str, object]) -> None:
    assert parse_chat(chat(**fields)) == parse_chat(chat())


def test_unknown_fields_are_ignored() -> None:
    assert parse_chat(chat(store=True, metadata={}, whatever=[1])) == parse_chat(chat())


def test_roles_and_parts() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b", "cache_control": {}}]
    request = parse_chat(
        {
            "messages": [
                {"role": "developer", "content": "be kind"},
                {"role": "user", "content": parts, "name": "Ann"},
                {"role": "assistant", "content": "", "tool_calls": [], "refusal": None},
            ]
        }
    )
    assert said(request).messages == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "a b"},
        {"role": "assistant", "content": ""},
    ]


@pytest.mark.requirement("B-02", "S-15")
@pytest.mark.parametrize(
    ("message", "place"),
    [
        ("hi", ""),
        ({}, ".role"),
        ({"role": "function", "content": "x"}, ".role"),
        ({"role": "tool"}, ".content"),
        ({"role": "assistant"}, ".content"),
        ({"role": 5, "content": "x"}, ".role"),
        ({"role": "user"}, ".content"),
        ({"role": "user", "content": None}, ".content"),
        ({"role": "user", "content": 5}, ".content"),
        ({"role": "user", "content": []}, ".content"),
        ({"role": "user", "content": ["x"]}, ".content[0]"),
        ({"role": "user", "content": [{"type": "image_url"}]}, ".content[0].type"),
        ({"role": "user", "content": [{"type": "text"}]}, ".content[0].text"),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, ".content[0].text"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, ".tool_calls[0].function.name"),
        ({"role": "assistant", "content": "x", "audio": {}}, ".audio"),
    ],
)
def test_a_bad_message_is_named_by_its_place(message: object, place: str) -> None:
    with pytest.raises(BadRequest, match=re.escape(f"'messages[1]{place}'")) as caught:
        parse_chat({"messages": [*HELLO, message]})
    assert caught.value.param == f"messages[1]{place}"


@pytest.mark.requirement("B-07")
def test_a_tool_loop_is_what_templates_are_written_for() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    odd = {"id": "c2", "type": "function", "function": {"name": "add", "arguments": "{a"}}
    asked = [
        {"role": "assistant", "content": None, "tool_calls": [call, odd], "reasoning": "hm"},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    ]
    first, second = said(parse_chat(chat(messages=asked))).messages
    assert first["content"] == "" and first["reasoning_content"] == "hm"
    assert [c["function"]["arguments"] for c in first["tool_calls"]] == [{"a": 1}, "{a"]
    assert second == {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "2"}


ADD = {"name": "add", "parameters": {"type": "object"}, "strict": True}
SUB = {"name": "sub", "description": "less"}
TOOLS = [{"type": "function", "function": tool} for tool in (ADD, SUB)]
BOTH = (Tool("add", {"type": "object"}, strict=True), Tool("sub", {}))


@pytest.mark.parametrize(
    ("more", "calls"),
    [
        ({}, Calls(BOTH)),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, Calls(BOTH, several=False)),
        ({"tool_choice": "none"}, Calls()),
        ({"tool_choice": "required"}, Calls(BOTH, must=True)),
        (
            {"tool_choice": {"type": "function", "function": {"name": "sub"}}},
            Calls(BOTH[1:], must=True, several=False),
        ),
    ],
    ids=str,
)
def test_tools_and_who_chooses(more: dict[str, Any], calls: Calls) -> None:
    request = parse_chat(chat(tools=TOOLS, **more))
    assert request.ask.calls == calls
    assert said(request).tools == TOOLS  # whatever is chosen: the prompt begins with them


@pytest.mark.parametrize(
    ("tool", "place"),
    [
        ("x", ""),
        ({"type": "web_search"}, ".type"),
        ({"type": "function"}, ".function.name"),
        ({"type": "function", "function": {"name": "a b"}}, ".function.name"),
        (
            {"type": "function", "function": {**ADD, "parameters": []}},
            ".function.parameters",
        ),
        ({"type": "function", "function": {**ADD, "strict": 1}}, ".function.strict"),
    ],
    ids=str,
)
def test_a_bad_tool_is_named_by_its_place(tool: object, place: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_chat(chat(tools=[tool]))
    assert caught.value.param == f"tools[0]{place}"


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(BadRequest, match="'add'"):
        parse_chat(chat(tools=[TOOLS[0], TOOLS[1], TOOLS[0]]))


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("asked", "form"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, Form(ANY_OBJECT)),
        ({"type": "json_schema", "json_schema": {"schema": SCHEMA, "name": "x"}}, Form(SCHEMA)),
        (
            {"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": True}},
            Form(SCHEMA, strict=True),
        ),
    ],
    ids=str,
)
def test_forms_of_answers(asked: dict[str, Any], form: Form | None) -> None:
    assert parse_chat(chat(response_format=asked)).ask.form == form


@pytest.mark.parametrize(
    ("asked", "place"),
    [
        ({"kind": "x"}, "type"),
        ({"type": "xml"}, "type"),
        ({"type": "json_schema"}, "json_schema.schema"),
        (
            {"type": "json_schema", "json_schema": {"schema": 1}},
            "json_schema.schema",
        ),
    ],
    ids=str,
)
def test_a_bad_form_is_named_by_its_place(asked: dict[str, Any], place: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_chat(chat(response_format=asked))
    assert caught.value.param == f"response_format.{place}"


@pytest.mark.requirement("S-12")
@pytest.mark.parametrize("word", ask.OWN_WORDS)
def test_templates_hear_of_some_things_from_the_server_only(word: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_chat(chat(chat_template_kwargs={word: 1}))
    assert caught.value.param == f"chat_template_kwargs.{word}"


def test_an_answer_is_gathered() -> None:
    message = Message()
    parts: list[Part] = [
        Thought("hm"),
        Words("I "),
        Words("add."),
        CallBegins(0, "c0", "add"),
        CallArguments(0, '{"a":'),
        CallArguments(0, " 1}"),
    ]
    for part in parts:
        message.add(part)
    function = {"name": "add", "arguments": '{"a": 1}'}
    assert message.wire() == {
        "role": "assistant",
        "content": "I add.",
        "refusal": None,
        "reasoning_content": "hm",
        "tool_calls": [{"id": "c0", "type": "function", "function": function}],
    }
    assert Message().wire() == {"role": "assistant", "content": "", "refusal": None}


def test_usage() -> None:
    assert openai.usage(Usage(10, 4, 2)) == {
        "prompt_tokens": 10,
        "completion_tokens": 2,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


def test_an_error() -> None:
    assert openai.error_body(ContextLengthExceeded(9, 8))["error"] == {
        "message": ContextLengthExceeded(9, 8).message,
        "type": "invalid_request_error",
        "param": "messages",
        "code": "context_length_exceeded",
    }
