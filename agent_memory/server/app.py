"""The routes, and what becomes of errors: one list each."""

from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Lifespan

from agent_memory.errors import Refused, RequestError
from agent_memory.server import (
    agents,
    anthropic,
    anthropic_messages,
    batches,
    files,
    models,
    responses,
)
from agent_memory.server.access import for_owner
from agent_memory.server.chat import chat_completions
from agent_memory.server.completions import completions
from agent_memory.server.explain import explain
from agent_memory.server.failures import error_response
from agent_memory.server.health import healthz, metrics, readyz, root
from agent_memory.server.openapi import openapi
from agent_memory.server.sse import told

OF_EACH = [
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/completions", completions, methods=["POST"]),
    Route(anthropic.MESSAGES, anthropic_messages.create, methods=["POST"]),
    Route(anthropic.COUNT_TOKENS, anthropic_messages.count_tokens, methods=["POST"]),
    *responses.ROUTES,
    *models.ROUTES,
    *files.ROUTES,
    *batches.ROUTES,
    *agents.ROUTES,
    Route("/v1/requests/{request_id}/explain", explain),
    Route("/", root),
    Route("/health", healthz),
    Route("/healthz", healthz),
    Route("/readyz", readyz),
    Route("/openapi.json", openapi),
]
"""Whoever asks finds what is his own, see space.py, or what all may know."""

OF_ALL = [*models.CHANGES, Route("/metrics", metrics)]
"""What changes or shows something for everybody."""

ROUTES = [*map(for_owner, OF_ALL), *OF_EACH]


async def refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error_response(error, request.scope)


async def unrouted(request: Request, error: Exception) -> Response:
    """No such path, or not with this method."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path} is not here: {error.detail}."
    code = error.detail.lower().replace(" ", "_")
    response = error_response(Refused(error.status_code, code, what), request.scope)
    response.headers.update(error.headers or {})
    return response


async def unforeseen(request: Request, error: Exception) -> Response:
    return error_response(told(error), request.scope)


ERRORS: dict[Any, Any] = {
    RequestError: refused,
    HTTPException: unrouted,
    Exception: unforeseen,
}


def build(lifespan: Lifespan[Starlette]) -> Starlette:
    app = Starlette(routes=ROUTES, exception_handlers=ERRORS, lifespan=lifespan)
    app.router.redirect_slashes = False
    return app
