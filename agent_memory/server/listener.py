"""The socket that is listened on: a port, or a Unix socket that only its owner can open.

A Unix socket outlives its server as a file, and whoever removes one in use takes it from its
server.  So a lock beside it says whose it is: without the lock nothing is removed.  Main thread.
"""

import errno
import fcntl
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import Self

from agent_memory.config import Config
from agent_memory.errors import ConfigError, PortInUse

BACKLOG = 128
"""So many connections the event loop accepts in one go, too."""

EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
CONNECT_S = 1.0


class Listener:
    """`url`: where this machine's own programs find it."""

    def __init__(self, sock: socket.socket, url: str, place: Path | None, lock: int) -> None:
        self.socket = sock
        self.url = url
        self._place = place
        self._lock = lock

    @classmethod
    def open(cls, config: Config) -> "Listener":
        """Raises PortInUse or ConfigError."""
        if config.uds is None:
            return cls.tcp(config.host, config.port)
        return cls.unix(config.uds)

    @classmethod
    def tcp(cls, host: str, port: int) -> "Listener":
        sock = listen(host, port)
        name = EVERYWHERE.get(host, host)
        shown = f"[{name}]" if ":" in name else name
        return cls(sock, f"http://{shown}:{sock.getsockname()[1]}", None, -1)

    @classmethod
    def unix(cls, path: Path) -> "Listener":
        try:
            lock = _lock(path)
        except OSError as error:
            raise _unusable(path, error) from error
        sock = socket.socket(socket.AF_UNIX)
        try:
            _remove_stale(path)
            umask = os.umask(0o177)
            try:
                sock.bind(str(path))
            finally:
                os.umask(umask)
            sock.listen(BACKLOG)
        except BaseException as error:
            sock.close()
            os.close(lock)
            if isinstance(error, OSError):
                raise _unusable(path, error) from error
            raise
        return cls(sock, f"unix:{path}", path, lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    @property
    def where(self) -> dict[str, object]:
        """For the log.  Ask before the socket is handed on."""
        if self._place:
            return {"uds": str(self._place), "port": 0}
        host, port = self.socket.getsockname()[:2]
        return {"host": host, "port": port}

    def close(self) -> None:
        """Again does no harm."""
        self.socket.close()
        if self._place is None:
            return
        place, self._place = self._place, None
        with suppress(OSError):  # the next start removes it, too
            place.unlink()
        os.close(self._lock)  # its file stays: another may have it open by now


def listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"Port {port} of {host} is taken. Stop what listens there (lsof -i :{port} names "
                "it), or choose another with --port; 0 takes a free one."
            ) from error
        raise ConfigError(
            f"Port {port} of {host} cannot be listened on: {error.strerror}. Choose another host "
            "or port."
        ) from error


def _lock(path: Path) -> int:
    """Raises OSError, ConfigError or PortInUse."""
    _check_folder(path.parent)
    lock = path.with_name(f"{path.name}.lock")
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise _in_use(path) from error
    return fd


def _check_folder(folder: Path) -> None:
    """Where others may rename files, they can put their own socket in our place."""
    status = folder.stat()
    if status.st_uid not in (0, os.geteuid()) or (
        status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX
    ):
        raise ConfigError(
            f"--uds: others may change what is in {folder}. Choose a folder that only you can "
            "write to."
        )


def _remove_stale(path: Path) -> None:
    """With the lock held a socket is a dead server's, or that of a program that knows no lock."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(f"--uds: {path} is there and is no socket. Move it, or name another.")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(CONNECT_S)
        try:
            caller.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise _in_use(path)


def _in_use(path: Path) -> PortInUse:
    return PortInUse(
        f"Another program listens on {path}. Stop it (lsof {path} names it), or choose another "
        "path with --uds."
    )


def _unusable(path: Path, error: OSError) -> ConfigError:
    why = error.strerror or error
    return ConfigError(f"--uds: {path} cannot be listened on: {why}. Choose another path.")
