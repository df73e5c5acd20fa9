"""Requests as Anthropic has them, read, and an answer's blocks, events and errors."""

from typing import Any

import pytest

from agent_memory.errors import (
    BadRequest,
    EngineFailed,
    NotFound,
    Refused,
    Unavailable,
    UnsupportedParameter,
)
from agent_memory.model.answers import CallArguments, CallBegins, Part, Thought, Words
from agent_memory.model.forms import Form
from agent_memory.request import Conversation, SamplingParams
from agent_memory.server import anthropic
from agent_memory.server.anthropic_messages import (
    NOT_BUILT,
    SIGNATURE,
    Content,
    MessagesRequest,
    end_of,
    parse,
)
from agent_memory.server.ask import Calls, Usage
from agent_memory.server.turn import Ended
from tests.server.anthropics import HELLO, asking, said, text, user

# ── everything else ──────────────────────────────────────────────────────────────────────────


def test_the_least_request() -> None:
    asked = asking()
    assert said(asked) == Conversation([HELLO], [])
    assert asked.ask.model is None and asked.ask.max_tokens == 9 and asked.ask.stop == ()
    assert not asked.stream and not asked.marked
    assert (asked.ask.effort, asked.ask.form, asked.ask.calls) == (None, None, Calls())
    assert parse({"messages": [HELLO]}, {}, counted=True).ask.max_tokens is None


def test_every_parameter_arrives() -> None:
    session = "0f4a2b9c-1111-2222-3333-444455556666"
    asked = asking(
        model="m",
        temperature=1,
        top_p=0.5,
        top_k=3,
        stop_sequences=["a", "b"],
        stream=True,
        metadata={"user_id": f"user_x_account__session_{session}"},
        chat_template_kwargs={"enable_thinking": False},
    )
    assert (asked.ask.model, asked.ask.stop, asked.stream) == ("m", ("a", "b"), True)
    assert asked.ask.agent == session
    assert asked.ask.sampling_over(SamplingParams(0, 0, 0), 0) == SamplingParams(1, 0.5, 3)
    assert said(asked).options == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("field", "value", "place"),
    [
        ("model", 5, "model"),
        ("messages", None, "messages"),
        ("messages", [], "messages"),
        ("max_tokens", None, "max_tokens"),
        ("max_tokens", 0, "max_tokens"),
        ("max_tokens", "10", "max_tokens"),
        ("temperature", 1.01, "temperature"),
        ("top_p", 2, "top_p"),
        ("top_k", -1, "top_k"),
        ("stop_sequences", [""], "stop_sequences"),
        ("stream", 1, "stream"),
        ("system", 5, "system"),
        ("system", [{"type": "image"}], "system[0].type"),
        ("thinking", {"budget_tokens": 5}, "thinking.type"),
        ("thinking", {"type": "on"}, "thinking.type"),
        ("thinking", {"type": "enabled", "budget_tokens": 0}, "thinking.budget_tokens"),
        ("output_config", {"effort": "most"}, "output_config.effort"),
        ("output_config", {"format": {"type": "xml"}}, "output_config.format.type"),
        ("output_config", {"format": {"type": "json_schema"}}, "output_config.format.schema"),
        ("output_format", {"type": "json_schema", "schema": 5}, "output_format.schema"),
    ],
)
def test_a_wrong_value_names_its_place(field: str, value: object, place: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse({"max_tokens": 9, "messages": [HELLO], field: value}, {})
    assert caught.value.param == place and f"'{place}'" in caught.value.message


@pytest.mark.parametrize("field", NOT_BUILT)
def test_what_would_change_the_answer_is_refused(field: str) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        asking(**{field: [{"id": "x"}]})
    assert caught.value.param == field
    for harmless in (None, *NOT_BUILT[field]):
        assert asking(**{field: harmless}) == asking()


def test_what_does_not_change_it_is_ignored() -> None:
    edits = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    ignored = {"context_management": edits, "service_tier": "auto", "whatever": [1], "content": [1]}
    assert asking(**ignored) == asking()


@pytest.mark.parametrize(
    ("fields", "effort"),
    [
        ({}, None),
        ({"thinking": {"type": "disabled"}}, "none"),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}}, "none"),
        ({"thinking": {"type": "adaptive"}}, "high"),
        ({"thinking": {"type": "between_tools"}}, None),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}}, "max"),
        ({"output_config": {"effort": "low"}}, "low"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "low"),
        ({"thinking": {"type": "enabled", "budget_tokens": 16_384}}, "medium"),
        ({"thinking": {"type": "enabled", "budget_tokens": 31_999}}, "high"),
        ({"thinking": {"type": "enabled"}}, "high"),
    ],
    ids=str,
)
def test_how_much_to_think(fields: dict[str, Any], effort: str | None) -> None:
    assert asking(**fields).ask.effort == effort


def test_forms_of_answers() -> None:
    form = {"type": "json_schema", "schema": {"type": "object"}}
    for fields in ({"output_config": {"format": form}}, {"output_format": form}):
        assert asking(**fields).ask.form == Form({"type": "object"}, strict=True)


DEEP = [text("a", cache_control={"type": "ephemeral"})]


@pytest.mark.parametrize(
    "request_",
    [
        asking(cache_control={"type": "ephemeral"}),
        asking(system=[text("a", cache_control={"type": "ephemeral"})]),
        asking(tools=[{"name": "a", "input_schema": {}, "cache_control": {"type": "x"}}]),
        asking(user(text("a"), text("b", cache_control={"type": "ephemeral", "ttl": "1h"}))),
        asking(HELLO, user({"type": "tool_result", "tool_use_id": "t", "content": DEEP})),
    ],
)
def test_marks_anywhere_are_seen(request_: MessagesRequest) -> None:
    assert request_.marked


# ── answers ──────────────────────────────────────────────────────────────────────────────────


def gathered(*parts: Part) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """-> (blocks, events)."""
    content = Content()
    events = [event for part in parts for event in content.add(part)]
    return content.blocks, events + content.end()


def test_blocks_and_their_events() -> None:
    blocks, events = gathered(
        Thought("h"),
        Thought("m"),
        Words("I "),
        Words("add."),
        CallBegins(0, "c0", "add"),
        CallArguments(0, '{"a":'),
        CallArguments(0, " 1}"),
        CallBegins(1, "c1", "sub"),
        CallArguments(1, '{"b": '),
    )
    assert blocks == [
        {"type": "thinking", "thinking": "hm", "signature": SIGNATURE},
        {"type": "text", "text": "I add."},
        {"type": "tool_use", "id": "c0", "name": "add", "input": {"a": 1}},
        {"type": "tool_use", "id": "c1", "name": "sub", "input": {}},  # it was cut short
    ]
    kinds = [(e["index"], e.get("delta", e)["type"]) for e in events]
    thinking, words, call = "thinking_delta", "text_delta", "input_json_delta"
    start, stop = "content_block_start", "content_block_stop"
    assert kinds == [
        *((0, kind) for kind in (start, thinking, thinking, "signature_delta", stop)),
        *((1, kind) for kind in (start, words, words, stop)),
        *((2, kind) for kind in (start, call, call, stop)),
        *((3, kind) for kind in (start, call, stop)),
    ]
    started = [event["content_block"] for event in events if event["type"] == start]
    assert started[0] == {"type": "thinking", "thinking": "", "signature": ""}
    assert started[2] == {"type": "tool_use", "id": "c0", "name": "add", "input": {}}
    assert gathered() == ([], [])


@pytest.mark.parametrize(
    ("ended", "reason"),
    [
        (Ended(0, "stop"), "end_turn"),
        (Ended(0, "length"), "max_tokens"),
        (Ended(0, "tool_calls"), "tool_use"),
        (Ended(0, "stop", "END"), "stop_sequence"),
        (Ended(0, "tool_calls", "END"), "stop_sequence"),
    ],
)
def test_why_an_answer_ended(ended: Ended, reason: str) -> None:
    assert end_of(ended) == {"stop_reason": reason, "stop_sequence": ended.stop}


def test_usage_adds_up_to_the_prompt() -> None:
    read, computed = (
        {"cache_read_input_tokens": 4, "output_tokens": 2},
        "cache_creation_input_tokens",
    )
    plain = anthropic.usage(Usage(10, 4, 2), marked=False)
    assert plain == {"input_tokens": 6, computed: 0, **read}
    assert anthropic.usage(Usage(10, 4, 2), marked=True) == {"input_tokens": 0, computed: 6, **read}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (BadRequest("no"), "invalid_request_error"),
        (Refused(401, "x", "no"), "authentication_error"),
        (Refused(403, "x", "no"), "permission_error"),
        (NotFound("no"), "not_found_error"),
        (Refused(405, "x", "no"), "invalid_request_error"),
        (Refused(413, "x", "no"), "request_too_large"),
        (Refused(429, "x", "no"), "rate_limit_error"),
        (EngineFailed("no"), "api_error"),
        (Refused(505, "x", "no"), "api_error"),
        (Unavailable("no", reason="loading", retry_after=5), "overloaded_error"),
    ],
)
def test_errors_have_a_type_by_their_status(error: Any, kind: str) -> None:
    assert anthropic.error_body(error, "req-1") == {
        "type": "error",
        "error": {"type": kind, "message": "no"},
        "request_id": "req-1",
    }


@pytest.mark.parametrize(
    ("path", "here"),
    [
        ("/v1/messages", True),
        ("/v1/messages/", True),
        ("/v1/messages/count_tokens", True),
        ("/v1/messages2", False),
        ("/v1/chat/completions", False),
    ],
)
def test_where_its_endpoints_are(path: str, here: bool) -> None:
    assert anthropic.is_here(path) is here
