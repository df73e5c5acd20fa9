"""GET /openapi.json: every route and what it takes, for programs.

One table.  docs/http-api.md says what things mean.  Fields that are not named are accepted where a
client's own may come.  Event loop.
"""

import re
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from agent_memory import __version__
from agent_memory.server import schemas
from agent_memory.server.schemas import Schema

JSON = "application/json"
SAID = [{"role": "user", "content": "Hello"}]


@dataclass(frozen=True, slots=True)
class Takes:
    """A body, and one that is accepted.  `example` None: it depends on what is there already."""

    schema: Schema
    example: dict[str, Any] | None = None
    media_type: str = JSON


NOTHING = Takes(schemas.NOTHING, {})
PAGE = {"limit": {"type": "integer", "minimum": 1, "maximum": 100}, "after": schemas.STRING}
AGENT = "/v1/agents/{agent_id}"
RESPONSE = "/v1/responses/{response_id}"

# (method, path): what it does, the body it takes, its query.
OPERATIONS: dict[tuple[str, str], tuple[str, Takes | None, dict[str, Schema]]] = {
    ("POST", "/v1/chat/completions"): (
        "Answer a conversation",
        Takes(schemas.CHAT, {"messages": SAID, "max_tokens": 5, "temperature": 0}),
        {},
    ),
    ("POST", "/v1/completions"): (
        "Go on from text or tokens",
        Takes(schemas.COMPLETION, {"prompt": ["Once", [1, 2]], "max_tokens": 5, "logprobs": 1}),
        {},
    ),
    ("POST", "/v1/responses"): (
        "Answer, and keep the conversation",
        Takes(schemas.RESPONSE, {"input": "Hello", "max_output_tokens": 16, "store": False}),
        {},
    ),
    ("GET", RESPONSE): ("A kept response", None, {}),
    ("DELETE", RESPONSE): ("Forget a kept response", None, {}),
    ("GET", f"{RESPONSE}/input_items"): ("What it answered", None, {}),
    ("POST", f"{RESPONSE}/cancel"): ("Cancel it", NOTHING, {}),
    ("POST", "/v1/messages"): (
        "Answer a conversation, as Anthropic has it",
        Takes(schemas.ANTHROPIC, {"messages": SAID, "max_tokens": 5}),
        {},
    ),
    ("POST", "/v1/messages/count_tokens"): (
        "How many tokens a conversation has",
        Takes(schemas.ANTHROPIC_TOLD, {"messages": SAID}),
        {},
    ),
    ("GET", "/v1/models"): ("The models", None, {}),
    ("GET", "/v1/models/{model_id}"): ("One of them", None, {}),
    ("POST", "/v1/models/{model_id}/load"): ("Bring it into memory", NOTHING, {}),
    ("POST", "/v1/models/{model_id}/unload"): ("Take it out of memory", NOTHING, {}),
    ("POST", "/v1/files"): (
        "Leave a file for a batch",
        Takes(schemas.FILE, media_type="multipart/form-data"),
        {},
    ),
    ("GET", "/v1/files"): ("The files", None, {**PAGE, "purpose": schemas.STRING}),
    ("GET", "/v1/files/{file_id}"): ("One of them", None, {}),
    ("DELETE", "/v1/files/{file_id}"): ("Delete it", None, {}),
    ("GET", "/v1/files/{file_id}/content"): ("Its bytes", None, {}),
    ("POST", "/v1/batches"): ("Have a file of requests answered", Takes(schemas.BATCH), {}),
    ("GET", "/v1/batches"): ("The batches", None, PAGE),
    ("GET", "/v1/batches/{batch_id}"): ("One of them", None, {}),
    ("POST", "/v1/batches/{batch_id}/cancel"): ("Cancel it", NOTHING, {}),
    ("GET", "/v1/agents"): ("Who has what in mind", None, {}),
    ("POST", "/v1/agents/import"): (
        "An agent from an exported file",
        Takes({"type": "string", "format": "binary"}, media_type="application/octet-stream"),
        {"name": schemas.STRING},
    ),
    ("GET", AGENT): ("What an agent has in mind", None, {"text": {"enum": ["true", "false"]}}),
    ("DELETE", AGENT): ("Forget it", None, {}),
    ("GET", f"{AGENT}/export"): ("Its memory as a file", None, {}),
    ("POST", f"{AGENT}/fork"): ("A second agent with its memory", Takes(schemas.FORK), {}),
    ("POST", f"{AGENT}/rewind"): ("Forget what comes after", Takes(schemas.REWIND), {}),
    ("POST", f"{AGENT}/pin"): ("Keep it before all others", NOTHING, {}),
    ("POST", f"{AGENT}/unpin"): ("No longer", NOTHING, {}),
    ("POST", f"{AGENT}/warm"): ("Bring its memory to RAM", NOTHING, {}),
    ("GET", "/v1/requests/{request_id}/explain"): ("Why was it a miss?", None, {}),
    ("GET", "/"): ("What this is", None, {}),
    ("GET", "/health"): ("The same as /healthz", None, {}),
    ("GET", "/healthz"): ("Alive?", None, {}),
    ("GET", "/readyz"): ("Would it serve?", None, {}),
    ("GET", "/metrics"): ("Figures for Prometheus", None, {}),
    ("GET", "/openapi.json"): ("This", None, {}),
}

ERROR = {
    "description": "What went wrong",
    "content": {JSON: {"schema": schemas.an_object({"error": {"type": "object"}})}},
}


async def openapi(request: Request) -> Response:
    return JSONResponse(document())


def document() -> dict[str, Any]:
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), (does, takes, query) in OPERATIONS.items():
        paths.setdefault(path, {})[method.lower()] = {
            "summary": does,
            "parameters": _parameters(path, query),
            **({"requestBody": _body(takes)} if takes else {}),
            "responses": {"2XX": {"description": "Done"}, "default": ERROR},
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Agent Memory", "version": __version__},
        "paths": paths,
    }


def _parameters(path: str, query: dict[str, Schema]) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {**schemas.STRING, "minLength": 1}}
        for name in re.findall(r"{(\w+)}", path)
    ] + [{"name": name, "in": "query", "schema": schema} for name, schema in query.items()]


def _body(takes: Takes) -> dict[str, Any]:
    told: dict[str, Any] = {"schema": takes.schema}
    if takes.example is not None:
        told["example"] = takes.example
    return {"required": takes is not NOTHING, "content": {takes.media_type: told}}
