"""The few file operations whose order and flags decide what survives a crash.

Knows POSIX.  Knows nothing of blocks.  Any thread.  Every function raises OSError.
"""

import fcntl
import os
import secrets
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Piece = bytes | memoryview


def _fresh(nbytes: int) -> Bytes:
    return np.empty(nbytes, np.uint8)


def write_new(path: Path, pieces: Iterable[Piece]) -> None:
    """Create `path` with these bytes, on disk when this returns."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, 0o600)
    try:
        for piece in pieces:
            view = memoryview(piece)
            while view:
                view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def read_file(path: Path, take: Callable[[int], Bytes] = _fresh) -> Bytes:
    """The whole file, in an array from `take`.  Shorter than its size if it shrinks meanwhile."""
    # A pipe in its place must not make us wait for a writer: it is read as an empty file.
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb", buffering=0) as file:
        raw = take(os.fstat(fd).st_size)
        rest = raw.data
        while rest and (got := file.readinto(rest)):
            rest = rest[got:]
    return raw[: raw.size - len(rest)]


def sync_folder(path: Path) -> None:
    """Names made or moved in this folder are on disk when this returns."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def flush_drive(path: Path) -> None:
    """On macOS fsync ends in the drive's cache; this empties it.  `path` is any file there."""
    if sys.platform != "darwin":
        return
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    finally:
        os.close(fd)


def move_into(folder: Path, path: Path) -> Path:
    """Move a file into `folder` under a name not taken there."""
    target = folder / f"{path.name}.{secrets.token_hex(4)}"
    path.rename(target)
    return target
