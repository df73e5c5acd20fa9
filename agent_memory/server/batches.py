"""/v1/batches: many requests in one file, answered when nothing else wants to be, as OpenAI has it.

The work is batch_runner.py's.  Event loop.
"""

import asyncio
import re
import time
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from agent_memory.errors import BadRequest, Conflict, NotFound
from agent_memory.server import batch_lines, body, kept
from agent_memory.server.batch_runner import Batches
from agent_memory.server.body import Fields
from agent_memory.server.pages import page
from agent_memory.store.documents import Document, Documents

PATH = "/v1/batches"
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_WINDOW = re.compile(r"([1-9][0-9]{0,3})([smhd])")


async def create(request: Request) -> Response:
    fields = Fields(body.parse(await request.body()))
    there = {getattr(route, "path", None) for route in request.app.routes}
    endpoints = [path for path in ENDPOINTS if path in there]
    endpoint = fields.choice("endpoint", endpoints) or fields.refuse(
        "endpoint", "one of " + ", ".join(endpoints)
    )
    window_s, metadata = _window_s(fields), fields.below("metadata")
    file_id = fields.text("input_file_id") or fields.refuse("input_file_id", "the id of a file")
    total = await asyncio.to_thread(_num_lines, request.state.documents[kept.FILES], file_id)
    if not 0 < total <= batch_lines.MAX_LINES:
        raise BadRequest(
            f"The file has {total} lines; it must have 1 to {batch_lines.MAX_LINES}.",
            param="input_file_id",
        )
    batch = _new(endpoint, file_id, fields.text("completion_window"), window_s, total)
    batch["metadata"] = {name: metadata.get(name) for name in metadata} or None
    await _batches(request).add(batch)
    return JSONResponse(batch)


async def listed(request: Request) -> Response:
    found = await asyncio.to_thread(kept.everyone, _documents(request))
    return page(request, [_batches(request).now(one) for one in found])


async def one(request: Request) -> Response:
    return JSONResponse(_batches(request).now(await _found(request)))


async def cancel(request: Request) -> Response:
    batch = await _found(request)
    cancelled = await _batches(request).cancel(batch["id"])
    if cancelled is None:
        raise Conflict(f"The batch is {batch['status']} already.", code="batch_ended")
    return JSONResponse(cancelled)


def _new(endpoint: str, file_id: str, window: str | None, window_s: int, total: int) -> Document:
    now = int(time.time())
    moments = "in_progress finalizing completed failed expired cancelling cancelled".split()
    return {
        "id": f"batch_{uuid4().hex}",
        "object": "batch",
        "endpoint": endpoint,
        "errors": None,
        "input_file_id": file_id,
        "completion_window": window,
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": now,
        "expires_at": now + window_s,
        **{f"{moment}_at": None for moment in moments},
        "request_counts": {"total": total, "completed": 0, "failed": 0},
        "metadata": None,
    }


def _window_s(fields: Fields) -> int:
    window = _WINDOW.fullmatch(fields.text("completion_window") or "")
    if window is None:
        fields.refuse("completion_window", "such as 24h: up to 4 digits and one of s m h d")
    return int(window[1]) * UNITS_S[window[2]]


def _num_lines(files: Documents, file_id: str) -> int:
    """A worker thread."""
    if kept.found(files, file_id) is None:
        raise NotFound(
            f"There is no file '{file_id}'. Leave it at /v1/files first.",
            param="input_file_id",
            code="file_not_found",
        )
    return batch_lines.count(files.data(file_id))


def _batches(request: Request) -> Batches:
    batches: Batches = request.state.batches
    return batches


def _documents(request: Request) -> Documents:
    documents: Documents = request.state.documents[kept.BATCHES]
    return documents


async def _found(request: Request) -> Document:
    batch_id = request.path_params["batch_id"]
    found = await asyncio.to_thread(kept.found, _documents(request), batch_id)
    if found is None:
        raise NotFound(f"There is no batch '{batch_id}'.", param="batch_id", code="batch_not_found")
    return found


ROUTES = [
    Route(PATH, create, methods=["POST"]),
    Route(PATH, listed),
    Route(f"{PATH}/{{batch_id}}/cancel", cancel, methods=["POST"]),
    Route(f"{PATH}/{{batch_id}}", one),
]
