"""Files and batches as they are kept, and as they are listed.

What is kept is waited for in worker threads; the rest is the event loop's.
"""

import time
from collections.abc import Iterable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from agent_memory.errors import BadRequest
from agent_memory.store.documents import Document, Documents
from agent_memory.store.files import Piece, write_new

FILES = "files"
BATCHES = "batches"
MAX_LISTED = 100


def keep(
    files: Documents, file_id: str, filename: str, purpose: str, pieces: Iterable[Piece]
) -> Document:
    """A file by this id, in place of one of before.  Raises OSError.  A worker thread."""
    path = files.data(file_id)
    path.unlink(missing_ok=True)
    try:
        write_new(path, pieces)
        told = {
            "id": file_id,
            "object": "file",
            "bytes": path.stat().st_size,
            "created_at": int(time.time()),
            "expires_at": None,
            "filename": filename,
            "purpose": purpose,
            "status": "processed",
        }
        files.put(file_id, told)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return told


def everyone(documents: Documents) -> list[Document]:
    """The newest first.  A worker thread."""
    found = [one for doc_id in documents.ids() if (one := documents.get(doc_id))]
    return sorted(found, key=lambda one: int(one["created_at"]), reverse=True)


def page(request: Request, found: list[dict[str, Any]]) -> Response:
    """A part of a list: `limit` entries that come after the one with the id `after`."""
    text, after = request.query_params.get("limit", "20"), request.query_params.get("after")
    if not text.isdecimal() or not 1 <= len(text) <= 5 or not 1 <= int(text) <= MAX_LISTED:
        raise BadRequest(f"'limit' must be 1 to {MAX_LISTED}.", param="limit")
    ids = [one["id"] for one in found]
    if after and after not in ids:
        raise BadRequest(f"'after' must be an id of the list, not '{after}'.", param="after")
    first = ids.index(after) + 1 if after else 0
    data = found[first : first + int(text)]
    return JSONResponse(
        {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": first + len(data) < len(found),
        }
    )
