"""OpenAI's shapes, read and written."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_memory.errors import BadRequest, ContextLengthExceeded, UnsupportedParameter
from agent_memory.request import SamplingParams
from agent_memory.server import openai
from agent_memory.server.openai import NOT_BUILT, ChatAnswer, Usage, parse_chat

HELLO = [{"role": "user", "content": "Hello"}]


def chat(**fields: object) -> dict[str, Any]:
    return {"messages": HELLO, **fields}


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
FIELDS = ["model", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options"]
MESSAGE = st.dictionaries(st.sampled_from(["role", "content", "name"]), ANYTHING)
BODY = st.dictionaries(st.sampled_from([*FIELDS, *NOT_BUILT]), ANYTHING)


@given(BODY, st.lists(MESSAGE) | ANYTHING)
def test_whatever_comes_is_a_request_or_a_bad_request(body: dict[str, Any], messages: Any) -> None:
    for given_messages in (messages, HELLO):
        try:
            request = parse_chat({**body, "messages": given_messages})
        except BadRequest as error:
            assert error.param and f"'{error.param}'" in error.message
        else:
            assert request.messages


def test_the_least_request() -> None:
    request = parse_chat(chat())
    assert request.messages == HELLO
    assert request.model is None and request.max_tokens is None and request.stop == ()
    assert not request.stream and not request.include_usage
    defaults = SamplingParams(0.7, 0.9, 20)
    assert request.sampling_over(defaults) == defaults


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
        )
    )
    assert (request.model, request.max_tokens, request.stop) == ("m", 7, ("a", "b"))
    assert request.stream and request.include_usage
    assert request.sampling_over(SamplingParams(1, 0.1, 9)) == SamplingParams(0, 1, 0, 0.5, -3)


def test_the_newer_name_of_the_limit_wins() -> None:
    assert parse_chat(chat(max_tokens=7, max_completion_tokens=9)).max_tokens == 9
    assert parse_chat(chat(max_tokens=7, max_completion_tokens=None)).max_tokens == 7


def test_one_stop_may_be_bare() -> None:
    assert parse_chat(chat(stop="END")).stop == ("END",)


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
        ("stop", ["a"] * 5),
        ("stop", "x" * 201),
        ("stop", {"a": 1}),
        ("stream", 1),
        ("stream", "true"),
        ("stream_options", True),
        ("stream_options", []),
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
    ("field", "value"),
    [("n", 2), ("n", True), ("logprobs", 0), ("frequency_penalty", 0.1), ("top_logprobs", 1)],
)
def test_a_value_near_the_default_is_not_the_default(field: str, value: object) -> None:
    with pytest.raises(UnsupportedParameter):
        parse_chat(chat(**{field: value}))


@pytest.mark.parametrize(
    "fields",
    [{name: value} for name, harmless in NOT_BUILT.items() for value in (None, *harmless)]
    + [{"presence_penalty": 0.0}],
    ids=str,
)
def test_what_means_the_default_is_accepted(fields: dict[str, object]) -> None:
    assert parse_chat(chat(**fields)) == parse_chat(chat())


def test_unknown_fields_are_ignored() -> None:
    assert parse_chat(chat(user="u", store=True, metadata={}, whatever=[1])) == parse_chat(chat())


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
    assert request.messages == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "a b"},
        {"role": "assistant", "content": ""},
    ]


@pytest.mark.parametrize(
    ("message", "place"),
    [
        ("hi", ""),
        ({}, ".role"),
        ({"role": "tool", "content": "x"}, ".role"),
        ({"role": 5, "content": "x"}, ".role"),
        ({"role": "user"}, ".content"),
        ({"role": "user", "content": None}, ".content"),
        ({"role": "user", "content": 5}, ".content"),
        ({"role": "user", "content": []}, ".content"),
        ({"role": "user", "content": ["x"]}, ".content[0]"),
        ({"role": "user", "content": [{"type": "image_url"}]}, ".content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, ".content[0].text"),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, ".content[0].text"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, ".tool_calls"),
    ],
)
def test_a_bad_message_is_named_by_its_place(message: object, place: str) -> None:
    with pytest.raises(BadRequest, match=re.escape(f"'messages[1]{place}'")) as caught:
        parse_chat({"messages": [*HELLO, message]})
    assert caught.value.param == f"messages[1]{place}"


def test_a_whole_answer() -> None:
    whole = ChatAnswer("id-1", "m").whole("Hi", "stop", Usage(10, 4, 2))
    created = whole.pop("created")
    assert isinstance(created, int)
    assert whole == {
        "id": "id-1",
        "object": "chat.completion",
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hi", "refusal": None},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "usage": {
            "prompt_tokens": 10,
            "completion_tokens": 2,
            "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    }


def test_chunks_share_their_frame() -> None:
    answer = ChatAnswer("id-1", "m")
    chunks = [
        answer.role(),
        answer.delta("Hi"),
        answer.finish("stop"),
        answer.usage(Usage(1, 0, 1)),
    ]
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
    assert [c["choices"][0]["delta"] for c in chunks[:3]] == [
        {"role": "assistant", "content": ""},
        {"content": "Hi"},
        {},
    ]
    assert [c["choices"][0]["finish_reason"] for c in chunks[:3]] == [None, None, "stop"]
    assert chunks[3]["choices"] == [] and chunks[3]["usage"]["total_tokens"] == 2


def test_an_error() -> None:
    assert openai.error_body(ContextLengthExceeded(9, 8))["error"] == {
        "message": ContextLengthExceeded(9, 8).message,
        "type": "invalid_request_error",
        "param": "messages",
        "code": "context_length_exceeded",
    }
