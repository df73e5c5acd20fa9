"""Whose request it is."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_memory.errors import BadRequest
from agent_memory.request import Priority
from agent_memory.server.identity import (
    HEADERS,
    agent_of,
    checked_name,
    is_name,
    name_for,
    priority_of,
)

SESSION = "3fae83f9-0a9c-4bd0-9c62-3a28cc0e4c63"


def in_order() -> list[tuple[dict[str, str], dict[str, object]]]:
    """One (headers, body) for each source, the strongest first; each names itself."""
    by_header: list[tuple[dict[str, str], dict[str, object]]]
    by_header = [({name: f"from:{name}"}, {}) for name in ("x-agent-id", *HEADERS)]
    return [
        *by_header,
        ({}, {"prompt_cache_key": "from:key"}),
        ({}, {"metadata": {"user_id": "from:metadata"}}),
        ({}, {"user": "from:user"}),
    ]


@pytest.mark.requirement("B-05")
def test_the_first_that_is_present_names_the_agent() -> None:
    headers: dict[str, str] = {}
    body: dict[str, object] = {}
    for more_headers, more_body in reversed(in_order()):
        headers |= more_headers
        body |= more_body
        name = agent_of(headers, body)
        assert name is not None and name.startswith("from:")
        assert name in json.dumps([more_headers, more_body])


def test_the_header_says_how_urgent_it_is_else_the_body_and_silence_is_interactive() -> None:
    interactive, background = Priority
    assert priority_of({}, {}) is priority_of({}, {"priority": None}) is interactive
    assert priority_of({}, {"priority": "background"}) is background
    assert priority_of({"x-priority": "interactive"}, {"priority": "background"}) is interactive
    others: list[object] = ["Background", "", "high", 1, True, ["background"], {}]
    for value in others:
        with pytest.raises(BadRequest) as caught:
            priority_of({}, {"priority": value})
        assert caught.value.param == "priority"
    with pytest.raises(BadRequest, match="'X-Priority' must be one of interactive, background"):
        priority_of({"x-priority": "low"}, {"priority": "background"})


@pytest.mark.requirement("B-05")
def test_without_any_it_is_anonymous() -> None:
    assert agent_of({}, {}) is None


@pytest.mark.parametrize(
    "body",
    [
        {"user": ""},
        {"user": 5},
        {"user": None},
        {"metadata": "bob"},
        {"metadata": {"user_id": ["bob"]}},
        {"prompt_cache_key": {"a": 1}},
    ],
)
def test_what_is_no_text_names_nobody(body: dict[str, object]) -> None:
    assert agent_of({"x-session-id": ""}, body) is None


@pytest.mark.parametrize(
    "user_id",
    [
        f"user_{'ab' * 32}_account__session_{SESSION}",
        f"user_1_account_2_session_{SESSION}",
        json.dumps({"device_id": "d", "account_uuid": "", "session_id": SESSION}),
    ],
)
def test_the_session_part_of_claude_code_counts(user_id: str) -> None:
    assert agent_of({}, {"metadata": {"user_id": user_id}}) == SESSION


@pytest.mark.parametrize(
    "user_id", ["{", '{"session_id": 7}', '{"session_id": ""}', "{" * 100_000, "[]", "user_1"]
)
def test_another_user_id_counts_whole(user_id: str) -> None:
    assert agent_of({}, {"metadata": {"user_id": user_id}}) == name_for(user_id)


@pytest.mark.parametrize("name", ["a", "A" * 200, "..a", "x.y_z:w@v-1", "..."])
def test_a_name(name: str) -> None:
    assert agent_of({"x-agent-id": name}, {}) == name


@pytest.mark.parametrize("text", ["", ".", "..", "a/b", "a b", "A" * 201, "é", "a\n", "a\x00"])
def test_what_is_no_name_is_an_error_only_where_it_means_us(text: str) -> None:
    with pytest.raises(BadRequest, match="X-Agent-ID is not an agent id"):
        agent_of({"x-agent-id": text}, {})
    with pytest.raises(BadRequest):
        checked_name(text, "the agent id in the path")
    assert agent_of({"x-session-id": text}, {}) == (name_for(text) if text else None)


@given(st.text(st.characters(), min_size=1))
def test_every_text_has_a_name(text: str) -> None:
    name = name_for(text)
    assert is_name(name)
    assert name == text or (name.startswith("x-") and len(name) == 34)


def test_texts_differ_by_their_names() -> None:
    texts = ["é", "e\u0301", "a/b", "a b", "Bob", "bob", ".", "..", "a" * 201, "a" * 202]
    assert len({name_for(text) for text in texts}) == len(texts)
