"""The routes as a list, and what is said of what nobody foresaw."""

import json

import pytest
from starlette.requests import Request
from starlette.routing import Route

from agent_memory.server import app

READING = {
    *("agents.agents", "agents.agent", "agents.export"),
    *("explain.explain", "models.models", "models.model"),
    *("health.root", "health.healthz", "health.readyz", "health.metrics"),
    *("responses.retrieve", "responses.input_items", "openapi.openapi"),
    *("files.listed", "files.one", "files.content", "batches.listed", "batches.one"),
}


@pytest.mark.requirement("S-23")
def test_what_changes_anything_is_no_get() -> None:
    """Pages and previews send GETs without being asked.  Whoever adds one here has looked."""
    gets = [route for route in app.ROUTES if "GET" in (route.methods or ())]
    assert gets and all(isinstance(route, Route) for route in gets)
    for route in gets:
        module = route.endpoint.__module__.rpartition(".")[2]
        assert f"{module}.{route.endpoint.__name__}" in READING, route.path
        assert route.methods == {"GET", "HEAD"}


@pytest.mark.requirement("S-16")
async def test_what_we_did_not_foresee_is_told_without_its_text() -> None:
    error = KeyError("what ann said, at 0x7f12ab")
    response = await app.unforeseen(Request({"type": "http", "path": "/v1/models"}), error)
    told = json.loads(bytes(response.body))["error"]
    assert (response.status_code, told["code"]) == (500, "internal_error")
    assert b"ann" not in response.body and b"0x7f" not in response.body
    assert b"KeyError" not in response.body
