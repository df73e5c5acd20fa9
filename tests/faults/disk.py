"""A disk that remembers every operation, and lets any of them fail.

Real files on a real file system: what the program asks of `os` and `sqlite3` for paths under one
folder passes through here, is counted, may be refused, and is written down.  From what was written
down `crash.py` makes the folder as a power cut would have left it.

SQLite's own operations are not seen.  A commit is one operation, and its files are taken as they
are after it: that a commit is atomic and durable is what SQLite is trusted with.
"""

import io
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from agent_memory.store import files


@dataclass(frozen=True, slots=True)
class Op:
    """One operation.  Paths are relative to the folder.

    `number` is that of the file, whatever its name is.  `offset`: of a write.  `files`: SQLite's,
    None if gone.  `told`: no operation, but what the program has said by then.
    """

    kind: str
    path: str = ""
    target: str = ""
    number: int = 0
    offset: int = 0
    data: bytes = b""
    files: tuple[tuple[str, bytes | None], ...] = ()
    told: object = None


Fault = Callable[[str, str], None]
"""(kind, path) before each operation; raises to refuse it."""


class Disk:
    """Any thread, one lock around what is kept; `log` may be read when nothing is going on."""

    def __init__(self, root: Path) -> None:
        self.root = os.fspath(root)
        self.log: list[Op] = []
        self.fault: Fault = lambda kind, path: None
        self.most_written: int | None = None
        """A write may be cut to so many bytes, as the system is free to."""
        self._lock = threading.RLock()
        self._real = {name: getattr(os, name) for name in _WATCHED}
        self._numbers: dict[str, int] = {}
        self._next_number = count(1)
        self._sizes: dict[int, int] = {}
        self._opened: dict[int, str] = {}
        self._index: dict[str, bytes | None] = {}

    @contextmanager
    def watched(self) -> Iterator["Disk"]:
        for folder, _, names in os.walk(self.root):
            for name in names:
                self._number(self._within(os.path.join(folder, name)))
        with pytest.MonkeyPatch.context() as patch:
            for name, watch in _WATCHED.items():
                patch.setattr(os, name, self._call(watch, name))
            connect = sqlite3.connect

            def connected(path: Any, **options: Any) -> sqlite3.Connection:
                if self._within(path) is None:
                    plain: sqlite3.Connection = connect(path, **options)
                    return plain
                self.before("connect", self._within(path) or "")
                db: _Connection = connect(path, factory=_Connection, **options)
                db.disk = self
                return db

            patch.setattr(sqlite3, "connect", connected)
            patch.setattr(files, "open", self._file, raising=False)
            yield self

    def before(self, kind: str, path: str) -> None:
        self.fault(kind, path)

    def tell(self, fact: object) -> None:
        """Write down what the program has said."""
        self._write_down(Op("told", told=fact))

    def index_changed(self) -> None:
        """Keep SQLite's files as they are now."""
        with self._lock:
            now = {name: self._contents(name) for name in ("index.db", "index.db-wal")}
            if now != self._index:
                self._index = now
                self._write_down(Op("index", files=tuple(now.items())))

    # ── what `os` is asked ───────────────────────────────────────────────────────────────────

    def _call(self, watch: Callable[..., Any], name: str) -> Callable[..., Any]:
        real = self._real[name]

        def called(*args: Any, **kwargs: Any) -> Any:
            return watch(self, real, *args, **kwargs)

        return called

    def _open(self, real: Callable[..., int], path: Any, flags: int, *rest: Any, **kw: Any) -> int:
        within = self._within(path)
        if within is None:
            fd = real(path, flags, *rest, **kw)
            self._opened.pop(fd, None)
            return fd
        new = bool(flags & os.O_CREAT) and not os.path.lexists(path)
        self.before("create" if new else "open", within)
        with self._lock:
            fd = real(path, flags, *rest, **kw)
            self._opened[fd] = within
            if new:
                self._numbers.pop(within, None)
                self._write_down(Op("create", within, number=self._number(within)))
        return fd

    def _file(self, fd: int, mode: str, buffering: int) -> io.FileIO:
        file = _File(fd, mode)
        file.disk = self
        file.path = self._opened.get(fd)
        return file

    def _write(self, real: Callable[..., int], fd: int, data: Any) -> int:
        path = self._opened.get(fd)
        if path is None:
            return real(fd, data)
        self.before("write", path)
        with self._lock:
            written = real(fd, memoryview(data)[: self.most_written])
            number = self._number(path)
            at = self._sizes.get(number, 0)
            self._sizes[number] = at + written
            piece = bytes(memoryview(data)[:written])
            self._write_down(Op("write", path, number=number, offset=at, data=piece))
        return written

    def _fsync(self, real: Callable[..., None], fd: int) -> None:
        path = self._opened.get(fd)
        if path is None:
            return real(fd)
        folder = os.path.isdir(os.path.join(self.root, path))
        self.before("sync_folder" if folder else "fsync", path)
        with self._lock:
            real(fd)
            number = 0 if folder else self._number(path)
            self._write_down(Op("sync_folder" if folder else "fsync", path, number=number))
        return None

    def _close(self, real: Callable[..., None], fd: int) -> None:
        self._opened.pop(fd, None)
        real(fd)

    def _rename(self, real: Callable[..., None], path: Any, target: Any) -> None:
        within, there = self._within(path), self._within(target)
        if within is None or there is None:
            return real(path, target)
        self.before("rename", within)
        with self._lock:
            real(path, target)
            number = self._numbers[there] = self._number(within)
            del self._numbers[within]
            self._write_down(Op("rename", within, there, number))
        return None

    def _unlink(self, real: Callable[..., None], path: Any, **kwargs: Any) -> None:
        self._named("unlink", real, path, **kwargs)

    def _mkdir(self, real: Callable[..., None], path: Any, *rest: Any, **kwargs: Any) -> None:
        self._named("mkdir", real, path, *rest, **kwargs)

    def _named(self, kind: str, real: Callable[..., Any], path: Any, *rest: Any, **kw: Any) -> None:
        within = self._within(path)
        if within is not None:
            self.before(kind, within)
        with self._lock:
            real(path, *rest, **kw)
            if within is not None:
                self._write_down(Op(kind, within))

    def _looked(self, real: Callable[..., Any], path: Any = ".", *rest: Any, **kw: Any) -> Any:
        within = self._within(path)
        if within is not None:
            self.before("look", within)
        return real(path, *rest, **kw)

    # ── what is kept ─────────────────────────────────────────────────────────────────────────

    def _write_down(self, op: Op) -> None:
        with self._lock:
            self.log.append(op)

    def _within(self, path: Any) -> str | None:
        """The path from the folder, or None if it is elsewhere."""
        if not isinstance(path, str | os.PathLike):
            return None
        text = os.fspath(path)
        if not isinstance(text, str) or not (text + "/").startswith(self.root + "/"):
            return None
        return text[len(self.root) + 1 :]

    def _number(self, path: str | None) -> int:
        assert path is not None
        if path not in self._numbers:
            self._numbers[path] = next(self._next_number)
        return self._numbers[path]

    def _contents(self, name: str) -> bytes | None:
        try:
            fd = self._real["open"](os.path.join(self.root, name), os.O_RDONLY)
        except FileNotFoundError:
            return None
        with open(fd, "rb") as file:
            return file.read()


_WATCHED: dict[str, Callable[..., Any]] = {
    "open": Disk._open,
    "write": Disk._write,
    "fsync": Disk._fsync,
    "close": Disk._close,
    "rename": Disk._rename,
    "unlink": Disk._unlink,
    "mkdir": Disk._mkdir,
    "stat": Disk._looked,
    "lstat": Disk._looked,
    "scandir": Disk._looked,
    "listdir": Disk._looked,
}


class _File(io.FileIO):
    """Open for reading."""

    disk: Disk
    path: str | None

    def readinto(self, into: Any) -> int:
        if self.path is not None:
            self.disk.before("read", self.path)
        return super().readinto(into)


class _Connection(sqlite3.Connection):
    """Tells its disk what becomes durable, and fails where the disk says so."""

    disk: Disk

    def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
        self.disk.before("index", "index.db")
        cursor = super().execute(sql, *args)
        if not self.in_transaction:
            self.disk.index_changed()
        return cursor

    def executescript(self, sql: str) -> sqlite3.Cursor:
        self.disk.before("index", "index.db")
        cursor = super().executescript(sql)
        self.disk.index_changed()
        return cursor

    def commit(self) -> None:
        self.disk.before("index", "index.db")
        super().commit()
        self.disk.index_changed()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> Any:
        try:
            self.disk.before("index", "index.db")
        except sqlite3.Error as fault:
            super().__exit__(type(fault), fault, fault.__traceback__)
            raise
        result = super().__exit__(kind, error, trace)
        self.disk.index_changed()
        return result

    def close(self) -> None:
        super().close()
        self.disk.index_changed()
