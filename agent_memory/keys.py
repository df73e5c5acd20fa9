"""Keys that clients bring: how they are written, kept and compared.

A server keeps only their hashes, so that nothing it logs or dumps can hold one.  Knows no HTTP.
Any thread.
"""

import hmac
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from agent_memory.errors import ConfigError

ALLOWED = "keys of 16 to 200 visible ASCII characters, with commas between them, or none"
CLIENT_VARIABLE = "AGENT_MEMORY_API_KEY"
MOST_FILE_BYTES = 1 << 16
_KEY = re.compile(r"[!-+\--~]{16,200}")


@dataclass(frozen=True, slots=True)
class Keys:
    """SHA-256 of each.  Without any, none is asked for."""

    digests: tuple[bytes, ...] = field(default=(), repr=False)

    def __bool__(self) -> bool:
        return bool(self.digests)

    def accept(self, key: str) -> bool:
        """In a time that depends neither on what is right nor on how much of it is."""
        digest = sha256(key.encode("utf-8", "surrogatepass")).digest()
        return sum(hmac.compare_digest(digest, known) for known in self.digests) > 0


def parse(text: str) -> Keys:
    """With commas or line ends between them; none is none.  Raises ValueError."""
    if text == "none":
        return Keys()
    found = _keys(text)
    if not found or not all(map(_KEY.fullmatch, found)):
        raise ValueError
    return Keys(tuple(sha256(key.encode()).digest() for key in found))


def private_text(path: Path) -> str:
    """Of a file that nobody else can read or change.  Raises ConfigError."""
    try:
        with path.open("rb") as file:
            check_private(path, os.fstat(file.fileno()))
            return file.read(MOST_FILE_BYTES).decode("utf-8", "replace")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}. Write a key on each of its lines and run "
            f"'chmod 600 {path}'."
        ) from error


def check_private(path: Path, status: os.stat_result) -> None:
    """Raises ConfigError."""
    if status.st_mode & 0o077:
        raise ConfigError(
            f"{path} holds keys and is open to other users. Run 'chmod 600 {path}', and change the "
            "keys if others may have read them."
        )
    if status.st_uid not in (0, os.geteuid()):
        raise ConfigError(f"{path} holds keys and belongs to another user. Use a file of your own.")


def of_client(environ: Mapping[str, str], file: Path | None) -> str:
    """The key that our own commands send: the file's first, else the variable's; "" is none.
    Raises ConfigError."""
    place = str(file) if file else CLIENT_VARIABLE
    found = _keys(private_text(file)) if file else _keys(environ.get(CLIENT_VARIABLE, ""))
    key = found[0] if found else ""
    if (file and not key) or (key and not _KEY.fullmatch(key)):
        raise ConfigError(f"{place}: what is there is no key. A server takes {ALLOWED}.")
    return key


def _keys(text: str) -> list[str]:
    return [key for part in re.split(r"[,\r\n]", text) if (key := part.strip())]
