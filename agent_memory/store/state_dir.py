"""The state directory: its lock, and the name of every path under it.

Knows names, permissions and who holds the lock.  Knows nothing of what the files hold.  Imports
only light modules: it runs before anything heavy, so that a second server leaves at once.  Any
thread; `open` and `close` belong to whoever owns the process.

    LOCK  VERSION  index.db  blocks/ab/<64 hex>.safetensors  tmp/  quarantine/  run/  documents/
    set-aside-<n>/
"""

import fcntl
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from agent_memory.errors import StateDirError, StateDirLocked
from agent_memory.processes import boot_id, start_of

BLOCK_SUFFIX = ".safetensors"
MOST_SIGNED_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Holder:
    """Who signed the lock.  `boot` and `start`: which process of that number is meant.  `url` is
    empty for who is no server; `stop_s`: within so long a server has ended when it is told to."""

    pid: int
    started: str
    boot: str
    start: str
    url: str
    stop_s: float

    @property
    def is_running(self) -> bool:
        """This very process, not one that was given its number since."""
        return bool(self.start) and self.boot == boot_id() and self.start == start_of(self.pid)


class StateDir:
    """A state directory, locked but for looking at it.  The lock lives as long as the descriptor it
    was taken on."""

    def __init__(self, path: Path, lock: int | None) -> None:
        self.path = path
        self._lock = lock
        self._started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
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
            state.sign()
            private_folder(state.run)
        except StateDirError:
            state.close()
            raise
        return state

    def sign(self, url: str = "", stop_s: float = 0.0) -> None:
        """Say in the lock who holds it.  Raises StateDirError."""
        assert self._lock is not None
        pid = os.getpid()
        more = {"boot": boot_id(), "start": start_of(pid), "url": url, "stop_s": stop_s}
        signed = f"{pid} {self._started}\n{json.dumps(more)}\n".encode()
        try:
            os.pwrite(self._lock, signed, 0)
            os.ftruncate(self._lock, len(signed))
        except OSError as error:
            raise StateDirError(
                f"{self.path / 'LOCK'} cannot be written: {error.strerror}. "
                "Make room on its disk, or choose another state directory."
            ) from error

    @staticmethod
    def holder(path: Path) -> Holder | None:
        """Who signed the lock last and has not let go of it in order."""
        try:
            with open(path / "LOCK", "rb") as file:
                return _read_holder(file.read(MOST_SIGNED_BYTES))
        except OSError:
            return None

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
    """Take the lock.  flock and not lockf: any close of the file would drop lockf's."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StateDirError(
            f"{path} cannot be written: {error.strerror}. "
            "Make its folder writable for you, or choose another state directory."
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = _holder(fd)
        os.close(fd)
        raise StateDirLocked(
            f"{path.parent} is in use by {holder}. "
            "Stop that one first ('agent-memory stop' or kill -TERM), or choose another state "
            "directory."
        ) from error
    except OSError as error:
        os.close(fd)
        raise StateDirError(
            f"{path} cannot be locked: {error.strerror}. Choose a state directory on a local disk."
        ) from error
    return fd


def _holder(fd: int) -> str:
    """The holder's name for itself; it may not have signed yet."""
    holder = _read_holder(os.pread(fd, MOST_SIGNED_BYTES, 0))
    return f"process {holder.pid}, started {holder.started}" if holder else "another process"


def _read_holder(signed: bytes) -> Holder | None:
    first, _, rest = signed.decode("utf-8", "replace").partition("\n")
    pid, _, started = first.partition(" ")
    if not (pid.isascii() and pid.isdigit()):
        return None
    try:
        more = json.loads(rest)
        return Holder(
            int(pid), started, more["boot"], more["start"], more["url"], float(more["stop_s"])
        )
    except (ValueError, KeyError, TypeError):  # it is only just signing
        return Holder(int(pid), started, "", "", "", 0.0)
