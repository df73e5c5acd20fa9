"""How an error is answered: in the shape of the API at whose path it happened.

The one place that decides that, for errors of the gate, of the routes and of what has no route.
Pure; any thread.
"""

from starlette.responses import JSONResponse
from starlette.types import Scope

from agent_memory.errors import Refused, RequestError, Unauthorized, Unavailable
from agent_memory.server import anthropic, openai


def error_response(error: RequestError, scope: Scope) -> JSONResponse:
    if anthropic.is_here(scope["path"]):
        body = anthropic.error_body(error, scope["state"]["request_id"])
    else:
        body = openai.error_body(error)
    response = JSONResponse(body, error.status)
    if isinstance(error, Unavailable):
        response.headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, Unauthorized):
        response.headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, Refused) and error.close:
        response.headers["Connection"] = "close"
    return response
