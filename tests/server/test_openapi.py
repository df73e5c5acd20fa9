"""What /openapi.json says is so."""

import re
from typing import Any

import pytest

from agent_memory.server import ask, completions, schemas
from agent_memory.server.app import ROUTES
from agent_memory.server.openapi import OPERATIONS, document
from tests.process import Server

EXAMPLES = [
    (path, takes.example)
    for (method, path), (_, takes, _) in OPERATIONS.items()
    if takes and takes.example and any(path == route.path for route in ROUTES)
]
BOUNDS: list[tuple[dict[str, Any], str, dict[str, object]]] = [
    (schemas.CHAT, "n", {"n": ask.MAX_CHOICES}),
    (schemas.CHAT, "seed", {"seed": ask.MAX_SEED - ask.MAX_CHOICES}),
    (schemas.CHAT, "top_logprobs", {"top_logprobs": ask.MAX_LOGPROBS, "logprobs": True}),
    (schemas.CHAT, "temperature", {"temperature": 2}),
    (schemas.CHAT, "presence_penalty", {"presence_penalty": 2}),
    (schemas.COMPLETION, "logprobs", {"logprobs": completions.MAX_LOGPROBS}),
]


def test_every_route_is_in_it() -> None:
    there = {
        (method, re.sub(r":\w+}", "}", route.path))
        for route in ROUTES
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert there and not there - OPERATIONS.keys()


def test_it_is_served_whole(server: Server) -> None:
    told = server.get("/openapi.json").json()
    assert told == document() and told["openapi"] == "3.1.0"
    assert {(m.upper(), path) for path, ways in told["paths"].items() for m in ways} == {
        *OPERATIONS
    }


@pytest.mark.parametrize(("path", "body"), EXAMPLES, ids=[path for path, _ in EXAMPLES])
def test_an_example_is_accepted(server: Server, path: str, body: dict[str, Any]) -> None:
    answer = server.post(body, path)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(("schema", "field", "most"), BOUNDS, ids=lambda value: str(value)[:20])
def test_a_bound_is_the_parsers(
    server: Server, schema: dict[str, Any], field: str, most: dict[str, Any]
) -> None:
    assert schema["properties"][field]["maximum"] == most[field]
    path = "/v1/chat/completions" if schema is schemas.CHAT else "/v1/completions"
    given = {"messages": [{"role": "user", "content": "x"}], "prompt": "x", "max_tokens": 1}
    assert server.post({**given, **most}, path).status_code == 200
    beyond = server.post({**given, **most, field: most[field] + 1}, path)
    assert beyond.status_code == 400 and beyond.json()["error"]["param"] == field
