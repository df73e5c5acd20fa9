"""/v1/files: what clients leave for batches, and what batches leave for them, as OpenAI has it.

Files belong to no agent, and stay until somebody deletes them.  Event loop; the disk is waited for
in worker threads.
"""

import asyncio
from collections.abc import Iterable
from mmap import ACCESS_READ, mmap
from typing import BinaryIO
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from agent_memory.errors import BadRequest, Conflict, NotFound, Refused
from agent_memory.server import kept, multipart, upload
from agent_memory.server.batch_runner import Batches
from agent_memory.server.multipart import Field
from agent_memory.server.pages import page
from agent_memory.store.documents import Document, Documents

PURPOSE = "batch"
ONE = "/v1/files/{file_id}"


async def create(request: Request) -> Response:
    boundary = multipart.boundary_of(request.headers["content-type"])
    form: BinaryIO = request.state.upload
    try:
        told = await asyncio.to_thread(_taken_in, form, boundary, _files(request))
    except OSError as error:
        raise Refused(507, "disk_full", f"The file cannot be kept: {error.strerror}.") from error
    return JSONResponse(told)


async def listed(request: Request) -> Response:
    purpose = request.query_params.get("purpose")
    found = await asyncio.to_thread(kept.everyone, _files(request))
    return page(request, [one for one in found if purpose in (None, one["purpose"])])


async def one(request: Request) -> Response:
    return JSONResponse(await _found(request))


async def content(request: Request) -> Response:
    file = await _found(request)
    path = _files(request).data(file["id"])
    return FileResponse(path, media_type="application/octet-stream")


async def remove(request: Request) -> Response:
    file_id, batches = request.path_params["file_id"], request.state.batches
    assert isinstance(batches, Batches)
    if batches.reads(file_id):
        raise Conflict(
            f"A batch that is under way reads '{file_id}'. Cancel it first.", code="file_in_use"
        )
    if not await asyncio.to_thread(_files(request).delete, file_id):
        raise _unknown(file_id)
    return JSONResponse({"id": file_id, "object": "file", "deleted": True})


def _taken_in(form: BinaryIO, boundary: bytes, files: Documents) -> Document:
    try:
        view = mmap(form.fileno(), 0, access=ACCESS_READ)
    except ValueError as error:  # it is empty
        raise BadRequest("The body is empty.", code="invalid_form") from error
    with view:
        found = {one.name: one for one in multipart.fields(view, boundary)}
        purpose, file = found.get("purpose"), found.get("file")
        if purpose is None or view[purpose.start : purpose.end] != PURPOSE.encode():
            raise BadRequest(f"'purpose' must be '{PURPOSE}'.", param="purpose")
        if file is None or file.start == file.end:
            raise BadRequest("'file' must be a file that is not empty.", param="file")
        filename, pieces = file.filename or "file", _pieces(view, file)
        return kept.keep(files, f"file-{uuid4().hex}", filename, PURPOSE, pieces)


def _pieces(view: mmap, field: Field, size: int = 1 << 20) -> Iterable[bytes]:
    return (view[at : min(at + size, field.end)] for at in range(field.start, field.end, size))


def _files(request: Request) -> Documents:
    files: Documents = request.state.documents[kept.FILES]
    return files


async def _found(request: Request) -> Document:
    file_id = request.path_params["file_id"]
    found = await asyncio.to_thread(kept.found, _files(request), file_id)
    if found is None:
        raise _unknown(file_id)
    return found


def _unknown(file_id: str) -> NotFound:
    return NotFound(f"There is no file '{file_id}'.", param="file_id", code="file_not_found")


ROUTES = [
    Route(upload.FILES_PATH, create, methods=["POST"]),
    Route(upload.FILES_PATH, listed),
    Route(f"{ONE}/content", content),
    Route(ONE, one),
    Route(ONE, remove, methods=["DELETE"]),
]
