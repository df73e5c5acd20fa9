"""What a body may be, and how its faults are named."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_memory.errors import BadRequest
from agent_memory.server.body import MAX_DEPTH, Fields, parse

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=20,
)


@given(st.dictionaries(TEXT, JSON))
def test_every_json_object_is_itself(value: dict[str, object]) -> None:
    assert parse(json.dumps(value).encode()) == value


@pytest.mark.requirement("S-10")
@given(st.binary())
def test_any_bytes_are_an_object_or_a_bad_request(raw: bytes) -> None:
    try:
        assert isinstance(parse(raw), dict)
    except BadRequest as error:
        assert error.code == "invalid_json"


@pytest.mark.requirement("S-10")
@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"a": NaN}',
        b'{"a": [Infinity]}',
        b'{"a": -Infinity}',
        b'{"a": [1e999]}',
        b'{"a": -1e400}',
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
        b'{"\\udfff": 1}',
        b'{"a": ["\\ud83d x"]}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b"[" * 5_000_000,
        b'{"a":' * 200_000,
        json.dumps({"a": json.loads("[" * MAX_DEPTH + "]" * MAX_DEPTH)}).encode(),
    ],
    ids=lambda raw: repr(raw[:20]),
)
def test_what_is_refused(raw: bytes) -> None:
    with pytest.raises(BadRequest, match="The body"):
        parse(raw)


def test_a_whole_surrogate_pair_is_a_character() -> None:
    assert parse(b'{"a": "\\ud83d\\ude00"}') == {"a": "\N{GRINNING FACE}"}


def test_null_is_absent() -> None:
    fields = Fields(dict.fromkeys("abcdef"))
    assert fields.text("a") is None and fields.integer("b", 0) is None
    assert fields.number("c", 0, 1) is None and fields.items("d") is None
    assert fields.flag("e") is False and fields.below("f").get("x") is None


@pytest.mark.parametrize("value", [True, "1", 1.0, 0, 11, [], {}])
def test_an_integer_is_an_integer_in_range(value: object) -> None:
    with pytest.raises(BadRequest, match=r"'outer.n' must be an integer from 1 to 10") as caught:
        Fields({"n": value}, "outer").integer("n", 1, 10)
    assert caught.value.param == "outer.n"


@pytest.mark.parametrize("value", [True, "1", -0.1, 2.1, math.inf, [], {}])
def test_a_number_is_a_number_in_range(value: object) -> None:
    with pytest.raises(BadRequest, match="a number from 0 to 2"):
        Fields({"n": value}).number("n", 0, 2)


def test_a_range_may_leave_its_low_end_out() -> None:
    fields = Fields({"zero": 0, "one": 1})
    assert fields.number("one", 0, 1, open_low=True) == 1.0
    with pytest.raises(BadRequest, match="above 0 and at most 1"):
        fields.number("zero", 0, 1, open_low=True)


def test_other_types_are_as_strict() -> None:
    fields = Fields({"n": 1, "s": "true"})
    for read in (fields.text, fields.flag, fields.items, fields.below):
        with pytest.raises(BadRequest, match="'n' must be"):
            read("n")
    with pytest.raises(BadRequest, match="true or false"):
        fields.flag("s")
