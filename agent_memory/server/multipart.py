"""A form as multipart/form-data has it, read where it lies: in a file.

Knows where each field's bytes are.  Pure; a worker thread, for the file may be large.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from email import message_from_string
from email.message import Message
from email.utils import collapse_rfc2231_value
from mmap import mmap

from agent_memory.errors import BadRequest

MAX_FIELDS = 16
MAX_HEAD_BYTES = 8 << 10
_BOUNDARY = re.compile(r"[A-Za-z0-9'()+_,./:=? -]{0,69}[A-Za-z0-9'()+_,./:=?-]")


@dataclass(frozen=True, slots=True)
class Field:
    """`filename` None: none was given.  Its bytes are those from `start` to `end`."""

    name: str
    filename: str | None
    start: int
    end: int


def boundary_of(content_type: str) -> bytes:
    """Raises BadRequest."""
    message = Message()
    message["content-type"] = content_type
    try:
        boundary = message.get_boundary("")
    except ValueError as error:  # in a character set of Python's own
        raise _broken("the Content-Type cannot be read") from error
    if not _BOUNDARY.fullmatch(boundary):
        raise _broken("the Content-Type names no boundary")
    return b"--" + boundary.encode()


def fields(form: mmap, boundary: bytes) -> Iterator[Field]:
    """Raises BadRequest."""
    if form[: len(boundary)] != boundary:
        raise _broken("it does not begin with its boundary")
    at = len(boundary)
    for _ in range(MAX_FIELDS):
        if form[at : at + 2] == b"--":
            return
        head = form.find(b"\r\n\r\n", at, at + MAX_HEAD_BYTES)
        end = form.find(b"\r\n" + boundary, head + 4 - 2)
        if form[at : at + 2] != b"\r\n" or head < 0 or end < 0:
            raise _broken("a field has no end")
        yield _field(form[at + 2 : head + 4], head + 4, max(head + 4, end))
        at = end + 2 + len(boundary)
    raise _broken(f"it has more than {MAX_FIELDS} fields")


def _field(head: bytes, start: int, end: int) -> Field:
    said = message_from_string(head.decode("utf-8", "replace"))
    try:
        name = said.get_param("name", header="content-disposition")
        told = collapse_rfc2231_value(name or ""), said.get_filename()
        "".join(filter(None, told)).encode()
    except ValueError as error:  # in a character set of Python's own, or half of a surrogate pair
        raise _broken("the name of a field cannot be read") from error
    if name is None:
        raise _broken("a field has no name")
    return Field(*told, start, end)


def _broken(what: str) -> BadRequest:
    return BadRequest(f"The body is no multipart/form-data: {what}.", code="invalid_form")
