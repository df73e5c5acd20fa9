"""Bodies of the Responses API, read: what arrives, what is refused and by which name."""

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_memory.errors import BadRequest, UnsupportedParameter
from agent_memory.model.forms import ANY_OBJECT, Form, Tool
from agent_memory.request import Conversation, Priority
from agent_memory.server.ask import Calls
from agent_memory.server.response_items import NAMES, REFERENCE
from agent_memory.server.responses import LOGPROBS, NOT_BUILT, SEALED, parse
from tests.server.responses import asked, told, user

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
FIELDS = (
    "model instructions previous_response_id store stream max_output_tokens temperature top_p "
    "tools tool_choice parallel_tool_calls text reasoning include top_logprobs truncation metadata "
    "user prompt_cache_key safety_identifier service_tier max_tool_calls stop seed priority"
).split()
KINDS = st.sampled_from([*NAMES, REFERENCE, "image_generation_call"])
ITEM = st.fixed_dictionaries(
    {},
    optional={
        "type": KINDS,
        "role": st.sampled_from(["user", "assistant", "system", "developer", "tool"]),
        **dict.fromkeys(
            "content id call_id name arguments output summary encrypted_content".split(), ANYTHING
        ),
    },
)
TOOL = st.fixed_dictionaries(
    {"type": st.sampled_from(["function", "namespace", "web_search", "custom"])},
    optional=dict.fromkeys(["name", "parameters", "strict", "tools"], ANYTHING),
)
CHOICE = st.fixed_dictionaries(
    {"type": st.sampled_from(["function", "allowed_tools"])},
    optional={"name": ANYTHING, "mode": ANYTHING, "tools": st.lists(TOOL) | ANYTHING},
)


@given(
    st.dictionaries(st.sampled_from([*FIELDS, *NOT_BUILT]), ANYTHING),
    st.lists(ITEM) | ANYTHING,
    st.lists(TOOL) | ANYTHING,
    CHOICE | ANYTHING,
)
def test_whatever_comes_is_a_request_or_a_bad_request(
    body: dict[str, Any], items: Any, tools: Any, choice: Any
) -> None:
    for values in ({"input": items}, {"input": "x", "tools": tools, "tool_choice": choice}):
        try:
            request = parse({**body, **values}, {})
        except BadRequest as error:
            assert error.param and (f"'{error.param}'" in error.message or error.param in str(body))
        else:
            assert request.items and isinstance(request.echo["store"], bool)


def test_the_least_request() -> None:
    request = asked()
    assert told(request) == Conversation([user("Hello")], [])
    assert request.ask.max_tokens is None and request.ask.logprobs is None
    assert request.echo["store"] and not request.stream and not request.seals
    assert request.echo["text"] == {"format": {"type": "text"}, "verbosity": "medium"}


def test_every_parameter_arrives() -> None:
    request = asked(
        model="m",
        instructions="Be kind.",
        previous_response_id="resp_1",
        store=False,
        stream=True,
        max_output_tokens=7,
        temperature=0,
        top_p=1,
        stop="END",
        text={"format": {"type": "json_object"}, "verbosity": "low"},
        reasoning={"effort": "low", "summary": "auto"},
        include=[SEALED, LOGPROBS],
        top_logprobs=3,
        truncation="auto",
        metadata={"user_id": "no", "a": "b"},
        prompt_cache_key="ann",
        priority="background",
    )
    assert (request.ask.model, request.ask.max_tokens, request.ask.stop) == ("m", 7, ("END",))
    assert (request.ask.agent, request.ask.priority) == ("ann", Priority.BACKGROUND)
    assert (request.ask.effort, request.ask.logprobs) == ("low", 3)
    assert request.ask.form == Form(ANY_OBJECT)
    assert request.ask.sampling == {"temperature": 0, "top_p": 1}
    assert request.stream and request.seals and request.previous == "resp_1"
    assert told(request).messages[0] == {"role": "system", "content": "Be kind."}
    echo = request.echo
    assert (echo["store"], echo["temperature"], echo["max_output_tokens"]) == (False, 0, 7)
    assert (echo["previous_response_id"], echo["truncation"]) == ("resp_1", "disabled")
    assert echo["metadata"] == {"user_id": "no", "a": "b"}
    assert asked(include=[LOGPROBS]).ask.logprobs == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input", None),
        ("input", []),
        ("input", {"role": "user"}),
        ("instructions", ["x"]),
        ("max_output_tokens", 0),
        ("temperature", 3),
        ("store", "yes"),
        ("stream", 1),
        ("previous_response_id", 5),
        ("include", "x"),
        ("top_logprobs", 21),
        ("truncation", "some"),
        ("tools", {}),
        ("tool_choice", "required"),
        ("tool_choice", "sometimes"),
        ("metadata", []),
        ("reasoning", "low"),
        ("text", []),
        ("prompt_cache_key", 1),
        ("max_tool_calls", -1),
    ],
)
def test_a_wrong_value_names_its_field(field: str, value: object) -> None:
    with pytest.raises(BadRequest) as caught:
        asked(**{field: value})
    assert caught.value.param == field and f"'{field}'" in caught.value.message


@pytest.mark.parametrize("field", NOT_BUILT)
def test_what_would_change_the_answer_is_refused(field: str) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        asked(**{field: {"something": "else"}})
    assert caught.value.param == field
    assert asked(**{field: None}).echo == asked(background=False).echo


# ── tools ────────────────────────────────────────────────────────────────────────────────────────

ADD = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": True}
SUB = {"type": "function", "name": "sub", "description": "less"}
TEAM = {"type": "namespace", "name": "team", "description": "of agents", "tools": [SUB]}
TOOLS = [ADD, SUB, TEAM, {"type": "web_search", "external_web_access": True}]
ALL = (Tool("add", {"type": "object"}, strict=True), Tool("sub", {}), Tool("team__sub", {}))


def allowed(mode: str, *tools: dict[str, str]) -> dict[str, Any]:
    return {"tool_choice": {"type": "allowed_tools", "mode": mode, "tools": list(tools)}}


@pytest.mark.parametrize(
    ("more", "calls", "given"),
    [
        ({}, Calls(ALL), ALL),
        ({"parallel_tool_calls": False}, Calls(ALL, several=False), ALL),
        ({"tool_choice": "none"}, Calls(), ALL),
        ({"tool_choice": "required"}, Calls(ALL, must=True), ALL),
        (
            {"tool_choice": {"type": "function", "name": "sub", "namespace": "team"}},
            Calls(ALL[2:], must=True, several=False),
            ALL,
        ),
        (
            allowed("required", {"type": "function", "name": "add"}, {"type": "web_search"}),
            Calls(ALL[:1], must=True),
            ALL,
        ),
        (allowed("auto", {"type": "function", "name": "sub"}), Calls(ALL[1:2]), ALL[1:2]),
        (allowed("auto"), Calls(), ()),
    ],
    ids=str,
)
def test_tools_and_who_chooses(more: dict[str, Any], calls: Calls, given: tuple[Tool, ...]) -> None:
    request = asked(tools=TOOLS, **more)
    assert request.ask.calls == calls
    assert [tool["function"]["name"] for tool in told(request).tools] == [t.name for t in given]


def test_the_template_is_given_what_a_chat_gives_it() -> None:
    assert list(told(asked(tools=[ADD])).tools) == [
        {
            "type": "function",
            "function": {"name": "add", "parameters": {"type": "object"}, "strict": True},
        }
    ]


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"tools": [{"type": "custom", "name": "patch"}]}, "tools[0].type"),
        ({"tools": [{"type": "mcp"}]}, "tools[0].type"),
        ({"tools": [{"name": "add"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{**ADD, "parameters": 1}]}, "tools[0].parameters"),
        ({"tools": [ADD, SUB, ADD]}, "tools[2].name"),
        ({"tools": [{**TEAM, "tools": [{"type": "custom"}]}]}, "tools[0].tools[0].type"),
        ({"tools": [ADD], "tool_choice": {"type": "custom"}}, "tool_choice.type"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name"),
        ({"tools": [ADD], **allowed("required")}, "tool_choice.tools"),
        ({"tools": [ADD], **allowed("must")}, "tool_choice.mode"),
        ({"tools": [ADD], **allowed("auto", {"type": "mcp"})}, "tool_choice.tools[0].type"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"text": {"verbosity": "huge"}}, "text.verbosity"),
        ({"include": [SEALED, "x"]}, "include[1]"),
        ({"reasoning": {"effort": "most"}}, "reasoning.effort"),
    ],
    ids=str,
)
def test_what_lies_deeper_is_named_by_its_place(fields: dict[str, Any], place: str) -> None:
    with pytest.raises(BadRequest) as caught:
        asked(**fields)
    assert caught.value.param == place


def test_a_form_is_described_beside_its_type() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    assert asked(text={"format": form}).ask.form == Form(schema, strict=True)


@pytest.mark.requirement("S-10")
def test_many_tools_or_items_take_no_time_of_others() -> None:
    """The event loop reads them."""
    began = time.process_time()
    with pytest.raises(BadRequest, match="at most 512"):
        asked(tools=[{"type": "function", "name": f"a{n}"} for n in range(50_000)])
    items = [{"type": "function_call", "call_id": "c", "name": "a", "arguments": "{}"}] * 50_000
    (message,) = told(asked(input=items)).messages
    assert len(message["tool_calls"]) == 50_000
    assert time.process_time() - began < 10
