"""A batch's lines: what each asks, and the journal of those that are answered.

Files and lines; knows nothing of how a line is answered.  Worker threads.
"""

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent_memory.errors import BadRequest
from agent_memory.server import body
from agent_memory.server.body import Fields

MAX_LINE_BYTES = 8 << 20
MAX_LINES = 50_000
"""Blank ones do not count."""
MAX_ID_CHARS = 512


@dataclass(frozen=True, slots=True)
class Line:
    """`number` from 1 on.  `asked` None: it asks nothing that could be answered, see `error`."""

    number: int
    custom_id: str | None
    asked: dict[str, Any] | None
    error: BadRequest | None = None


def count(path: Path) -> int:
    """Raises OSError."""
    return sum(1 for _ in _raw_lines(path))


def lines(path: Path, endpoint: str) -> Iterator[Line]:
    """Raises OSError."""
    seen: set[str] = set()
    for number, raw in _raw_lines(path):
        custom_id: str | None = None
        try:
            if len(raw) > MAX_LINE_BYTES:
                raise BadRequest(f"The line is longer than {MAX_LINE_BYTES >> 20} MiB.")
            fields = Fields(body.parse(raw))
            custom_id = _custom_id(fields, seen)
            yield Line(number, custom_id, _asked(fields, endpoint))
        except BadRequest as error:
            yield Line(number, custom_id, None, error)


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """One that is too long is cut behind what is allowed."""
    with path.open("rb") as file:
        number, at_begin = 0, True
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += at_begin
            if at_begin and raw.strip():
                yield number, raw
            at_begin = raw.endswith(b"\n")


def _custom_id(fields: Fields, seen: set[str]) -> str:
    custom_id = fields.text("custom_id")
    if not custom_id or len(custom_id) > MAX_ID_CHARS:
        fields.refuse("custom_id", f"a string of 1 to {MAX_ID_CHARS} characters")
    if custom_id in seen:
        fields.refuse("custom_id", "another one in each line")
    seen.add(custom_id)
    return custom_id


def _asked(fields: Fields, endpoint: str) -> dict[str, Any]:
    if fields.get("method") != "POST":
        fields.refuse("method", "POST")
    if fields.get("url") != endpoint:
        fields.refuse("url", f"{endpoint}, the batch's endpoint")
    asked = fields.get("body")
    if not isinstance(asked, dict):
        fields.refuse("body", "an object")
    if asked.get("stream"):
        fields.below("body").refuse("stream", "false or absent: a batch's answers are whole")
    return asked


class Journal:
    """The answered lines of a batch, in the order they came.  What was added is there after a
    crash; each line is added once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._adding = threading.Lock()

    def done(self) -> dict[int, bool]:
        """Which lines are answered, and whether well.  Half an entry at the end, as a crash leaves
        it, is taken away.  Raises OSError."""
        if not self._path.exists():
            return {}
        whole, found = 0, {}
        with self._path.open("r+b") as file:
            for raw in file:
                if not raw.endswith(b"\n"):
                    break
                whole += len(raw)
                entry = json.loads(raw)
                found[int(entry["line"])] = bool(entry["good"])
            file.truncate(whole)
        return found

    def add(self, number: int, good: bool, told: dict[str, Any]) -> None:
        """On disk when this returns.  Raises OSError, and then it is not there."""
        entry = {"line": number, "good": good, "told": told}
        raw = json.dumps(entry, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        with self._adding:
            fd = os.open(self._path, flags, 0o600)
            try:
                size = os.fstat(fd).st_size
                try:
                    if os.write(fd, raw) != len(raw):
                        raise OSError("the disk is full")
                    os.fsync(fd)
                except OSError:
                    os.ftruncate(fd, size)
                    raise
            finally:
                os.close(fd)

    def entries(self, *, good: bool) -> Iterator[bytes]:
        """As lines of a file.  Raises OSError."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            for raw in file:
                entry = json.loads(raw)
                if entry["good"] is good:
                    yield as_line(entry["told"])

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def as_line(told: dict[str, Any]) -> bytes:
    return json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
