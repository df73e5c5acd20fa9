"""What Anthropic's endpoints have in common: where they are, usage, errors.

Knows neither HTTP nor the engine.  Pure; any thread.
"""

from typing import Any

from agent_memory.errors import RequestError
from agent_memory.server.ask import Usage

MESSAGES = "/v1/messages"
COUNT_TOKENS = f"{MESSAGES}/count_tokens"
REQUEST_ID = "request-id"
"""The header in which its clients look for what is X-Request-ID elsewhere."""

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""By status.  Of the others below 500 it is invalid_request_error, from there on api_error."""


def is_here(path: str) -> bool:
    return path == MESSAGES or path.startswith(f"{MESSAGES}/")


def error_body(error: RequestError, request_id: str) -> dict[str, Any]:
    others = "invalid_request_error" if error.status < 500 else "api_error"
    return {
        "type": "error",
        "error": {"type": ERROR_TYPES.get(error.status, others), "message": error.message},
        "request_id": request_id,
    }


def usage(used: Usage, *, marked: bool) -> dict[str, Any]:
    """The first three add up to the prompt.  Whatever is computed is remembered; who has `marked`
    what to cache is told of it as such."""
    computed = used.prompt_tokens - used.cached_tokens
    return {
        "input_tokens": 0 if marked else computed,
        "cache_creation_input_tokens": computed if marked else 0,
        "cache_read_input_tokens": used.cached_tokens,
        "output_tokens": used.completion_tokens,
    }
