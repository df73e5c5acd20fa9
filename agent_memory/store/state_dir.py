"""The state directory: its lock, and the name of every path under it.

Knows names, permissions and who holds the lock.  Knows nothing of what the files hold.  Imports
only light modules: it runs before anything heavy, so that a second server leaves at once.  Any
thread; `open` and `close` belong to whoever owns the process.

    LOCK  VERSION  index.db  blocks/ab/<64 hex>.safetensors  tmp/  quarantine/  run/  documents/
    set-aside-<n>/
"""

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

from agent_memory.errors import StateDirError, StateDirLocked

BLOCK_SUFFIX = ".safetensors"


class StateDir:
    """A state directory, locked but for looking at it.  The lock lives as long as the descriptor it
    was taken on."""

    def __init__(self, path: Path, lock: int | None) -> None:
        self.path = path
        self._lock = lock
        self.version = path / "VERSION"
        self.index = path / "index.db"
        self.blocks = path / "blocks"
        self.tmp = path / "tmp"
        self.quarantine = path / "quarantine"
        self.run = path / "run"
        self.documents = path / "documents"

    @classmethod
    def open(cls, path: Path) -> "StateDir":
        """Make the directory private and lock it.  Raises StateDirError or StateDirLocked."""
        private_folder(path)
        state = cls(path, _lock(path / "LOCK"))
        try:
            private_folder(state.run)
        except StateDirError:
            state.close()
            raise
        return state

    @classmethod
    def unlocked(cls, path: Path) -> "StateDir":
        """To look at only: whoever holds the lock may be at work there."""
        return cls(path, None)

    def close(self) -> None:
        if self._lock is None:
            return
        fd, self._lock = self._lock, None
        with suppress(OSError):  # only information; a full disk must not keep the lock held
            os.ftruncate(fd, 0)
        os.close(fd)

    def block_path(self, block_hash: bytes) -> Path:
        name = block_hash.hex()
        return self.blocks / name[:2] / (name + BLOCK_SUFFIX)

    def block_folders(self) -> list[Path]:
        return [self.blocks / f"{first:02x}" for first in range(256)]

    def index_paths(self) -> list[Path]:
        return [self.index, *(self.path / f"index.db-{end}" for end in ("wal", "shm"))]

    def store_paths(self) -> list[Path]:
        """All that belongs to the store's format, VERSION last."""
        return [*self.index_paths(), self.blocks, self.tmp, self.quarantine, self.version]

    def next_set_aside(self) -> Path:
        taken = {path.name for path in self.path.glob("set-aside-*")}
        free = next(n for n in range(1, len(taken) + 2) if f"set-aside-{n}" not in taken)
        return self.path / f"set-aside-{free}"


def private_folder(path: Path) -> None:
    """Make `path` a folder of ours that nobody else may enter.  Raises StateDirError."""
    try:
        if path.is_symlink():
            raise StateDirError(f"{path} is a symbolic link. Give the folder's real path instead.")
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_mode & 0o777 != 0o700:
                os.fchmod(fd, 0o700)
            if os.fstat(fd).st_mode & 0o077:
                raise StateDirError(
                    f"{path} stays open to other users: its file system ignores permissions. "
                    "Choose a state directory on a local disk."
                )
        finally:
            os.close(fd)
    except (FileExistsError, NotADirectoryError) as error:
        raise StateDirError(
            f"{error.filename} is not a directory. Move it away or choose another state directory."
        ) from error
    except OSError as error:
        raise StateDirError(
            f"{path} cannot be used: {error.strerror}. "
            f"Run 'chmod u+rwx {path}' as its owner, or choose another state directory."
        ) from error


def _lock(path: Path) -> int:
    """Take the lock and sign it.  flock and not lockf: any close of the file would drop lockf's."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StateDirError(
            f"{path} cannot be written: {error.strerror}. "
            "Make its folder writable for you, or choose another state directory."
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        os.pwrite(fd, f"{os.getpid()} {started}\n".encode(), 0)
    except BlockingIOError as error:
        holder = _holder(fd)
        os.close(fd)
        raise StateDirLocked(
            f"{path.parent} is in use by {holder}. "
            "Stop that one first (kill -TERM), or choose another state directory."
        ) from error
    except OSError as error:
        os.close(fd)
        raise StateDirError(
            f"{path} cannot be locked: {error.strerror}. Choose a state directory on a local disk."
        ) from error
    return fd


def _holder(fd: int) -> str:
    """The holder's name for itself; it may not have signed yet."""
    pid, _, started = os.pread(fd, 64, 0).decode("ascii", "replace").strip().partition(" ")
    return f"process {pid}, started {started}" if pid.isdigit() else "another process"
