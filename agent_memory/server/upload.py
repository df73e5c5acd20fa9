"""A body too large for memory: written to a nameless file as it arrives.

Knows which route takes such a body, and its bounds.  A client that stops sending is given up, one
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
MEDIA_TYPES = ("application/x-tar", "application/octet-stream")
SILENCE_S = 30.0
_WRITE_BYTES = 1 << 20


def is_upload(scope: Scope) -> bool:
    return bool(scope["method"] == "POST" and scope["path"] == PATH)


def check_type(headers: Headers) -> None:
    """A form on a page of another site cannot send these types.  Raises Refused."""
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in MEDIA_TYPES:
        raise Refused(415, "media_type", f"The Content-Type must be {' or '.join(MEDIA_TYPES)}.")


@dataclass(frozen=True, slots=True)
class Place:
    """Where bodies go, and whether there is room for so many bytes more."""

    folder: Path
    has_room: Callable[[int], bool]


async def spool(receive: Receive, place: Place) -> BinaryIO | None:
    """The body in a file, at its beginning; None if the client has gone.  Raises Refused."""
    file = cast(BinaryIO, await asyncio.to_thread(tempfile.TemporaryFile, dir=place.folder))
    try:
        whole = await _fill(file, receive, place)
    except BaseException:
        file.close()
        raise
    if not whole:
        file.close()
        return None
    file.seek(0)
    return file


async def _fill(file: BinaryIO, receive: Receive, place: Place) -> bool:
    """Whether it came to its end."""
    more, waiting = True, bytearray()
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
