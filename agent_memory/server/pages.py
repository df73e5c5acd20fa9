"""A long list of things with ids, given out in parts.  Pure.  Any thread."""

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from agent_memory.errors import BadRequest

MAX_ENTRIES = 100
"""Of one part."""


def page(request: Request, entries: Sequence[dict[str, Any]]) -> Response:
    """`limit` entries, those that come after the one with the id `after`.  Raises BadRequest."""
    asked = request.query_params
    text, after = asked.get("limit", "20"), asked.get("after")
    if not (text.isdecimal() and len(text) < 4 and 1 <= int(text) <= MAX_ENTRIES):
        raise BadRequest(f"'limit' must be an integer from 1 to {MAX_ENTRIES}.", param="limit")
    ids = [entry["id"] for entry in entries]
    if after and after not in ids:
        raise BadRequest(f"'after' must be an id of this list, not '{after}'.", param="after")
    first = ids.index(after) + 1 if after else 0
    data = entries[first : first + int(text)]
    return JSONResponse(
        {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": first + len(data) < len(entries),
        }
    )
