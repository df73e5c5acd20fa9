"""A body too large for memory: written to a nameless file as it arrives.

Knows which routes take such a body, and its bounds.  A client that stops sending is given up, one
that would fill the disk is refused.  Event loop; the file is written in worker threads.
"""

import asyncio
import errno
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from agent_memory.errors import Refused

PATH = "/v1/agents/import"
FILES_PATH = "/v1/files"
SILENCE_S = 30.0
_WRITE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Taken:
    """What is taken where.  `most_bytes` None: as much as there is room for."""

    media_types: tuple[str, ...]
    most_bytes: int | None = None


# A page of another site can send a form, but not without saying where it is from: gate.py refuses
# it by that.
TAKEN = {
    PATH: Taken(("application/x-tar", "application/octet-stream")),
    FILES_PATH: Taken(("multipart/form-data",), 200 << 20),
}


def is_upload(scope: Scope) -> bool:
    return bool(scope["method"] == "POST" and scope["path"] in TAKEN)


def check_type(headers: Headers, path: str) -> None:
    """Raises Refused."""
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    known = TAKEN[path].media_types
    if media_type not in known:
        raise Refused(415, "media_type", f"The Content-Type must be {' or '.join(known)}.")


@dataclass(frozen=True, slots=True)
class Place:
    """Where bodies go, and whether there is room for so many bytes more."""

    folder: Path
    has_room: Callable[[int], bool]


async def spool(receive: Receive, place: Place, most_bytes: int | None = None) -> BinaryIO | None:
    """The body in a file, at its beginning; None if the client has gone.  Raises Refused."""
    file = cast(BinaryIO, await asyncio.to_thread(tempfile.TemporaryFile, dir=place.folder))
    try:
        whole = await _fill(file, receive, place, most_bytes)
    except BaseException:
        file.close()
        raise
    if not whole:
        file.close()
        return None
    file.seek(0)
    return file


async def _fill(file: BinaryIO, receive: Receive, place: Place, most_bytes: int | None) -> bool:
    """Whether it came to its end."""
    more, waiting, num_bytes = True, bytearray(), 0
    while more:
        try:
            async with asyncio.timeout(SILENCE_S):
                message = await receive()
        except TimeoutError as error:
            raise Refused(
                408, "body_timeout", f"Nothing came for {SILENCE_S:.0f} s.", close=True
            ) from error
        if message["type"] == "http.disconnect":
            return False
        waiting += message.get("body", b"")
        num_bytes += len(message.get("body", b""))
        if most_bytes is not None and num_bytes > most_bytes:
            raise Refused(
                413,
                "body_too_large",
                f"The body is larger than {most_bytes >> 20} MiB.",
                close=True,
            )
        more = message.get("more_body", False)
        if len(waiting) >= _WRITE_BYTES or not more:
            await asyncio.to_thread(_write, file, waiting, place)
            waiting.clear()
    return True


def _write(file: BinaryIO, data: bytearray, place: Place) -> None:
    try:
        if not place.has_room(len(data)):
            raise OSError(errno.ENOSPC, "the disk is as full as it may get")
        file.write(data)
        file.flush()
    except OSError as error:
        raise Refused(
            507,
            "disk_full",
            f"The file cannot be taken in: {error.strerror}. Free some space and send it again.",
            close=True,
        ) from error
