"""What OpenAI's APIs have in common: usage, errors, models, and fields that are not built.

Knows neither HTTP nor the engine.  Pure; any thread.
"""

from typing import Any

from agent_memory.errors import RequestError, UnsupportedParameter
from agent_memory.server.ask import Usage
from agent_memory.server.body import Fields


def usage(used: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "total_tokens": used.prompt_tokens + used.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": used.cached_tokens},
    }


def refuse_not_built(fields: Fields, table: dict[str, tuple[object, ...]]) -> None:
    """`table`: fields that would change the answer, with the values that leave it as it is."""
    for name, harmless in table.items():
        value = fields.get(name)
        if value is not None and not any(_same(value, other) for other in harmless):
            raise UnsupportedParameter(fields.place(name))


def _same(value: object, other: object) -> bool:
    """Equal as JSON, where true is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def error_body(error: RequestError) -> dict[str, Any]:
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }


def model_entry(model_id: str, more: dict[str, object]) -> dict[str, object]:
    """`created` is a field that clients expect and nobody can fill."""
    return {
        "id": model_id,
        "object": "model",
        "created": 0,
        "owned_by": "agent-memory",
        **more,
    }
