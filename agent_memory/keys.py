"""Keys that clients bring: how they are written, kept and compared, and whose they are.

    KEY           the owner's: it may do all, and has the memory that is no tenant's
    TENANT:KEY    that tenant's; the colon is part of no key

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

from agent_memory import tenants
from agent_memory.errors import ConfigError

ALLOWED = (
    "keys of 16 to 200 visible ASCII characters but : and ,; before one TENANT: with a name of up "
    "to 32 of a-z 0-9 -; commas between them; or none"
)
CLIENT_VARIABLE = "AGENT_MEMORY_API_KEY"
MOST_FILE_BYTES = 1 << 16
_KEY = re.compile(rf"(?:({tenants.NAME}):\s*)?([!-+\--9;-~]{{16,200}})")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks.  `tenant` None: of no tenant.  `trusted`: names and reasons may be told."""

    tenant: str | None = None
    trusted: bool = True

    @property
    def is_owner(self) -> bool:
        """Whoever asks where nobody needs a key is, too."""
        return self.trusted and self.tenant is None


@dataclass(frozen=True, slots=True)
class Keys:
    """The SHA-256 of each, and the tenant whose it is.  Without any, none is asked for."""

    known: tuple[tuple[bytes, str | None], ...] = field(default=(), repr=False)

    def __bool__(self) -> bool:
        return bool(self.known)

    @property
    def tenants(self) -> tuple[str | None, ...]:
        """The owner, None, and the others by name."""
        named = {tenant for _, tenant in self.known if tenant is not None}
        return (None, *sorted(named))

    def caller(self, key: str) -> Caller | None:
        """In a time that depends neither on what is right nor on how much of it is."""
        digest = sha256(key.encode("utf-8", "surrogatepass")).digest()
        found = [tenant for known, tenant in self.known if hmac.compare_digest(digest, known)]
        return Caller(found[0]) if found else None


def parse(text: str) -> Keys:
    """With commas or line ends between them; none is none.  Raises ValueError, also where a key is
    two tenants'."""
    if text == "none":
        return Keys()
    found = [_KEY.fullmatch(entry) for entry in _entries(text)]
    known = {(sha256(one[2].encode()).digest(), one[1]) for one in found if one}
    if not found or not all(found) or len({digest for digest, _ in known}) < len(known):
        raise ValueError
    return Keys(tuple(sorted(known, key=lambda one: one[0])))


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
    """The key that our own commands send, without its tenant: the file's first, else the
    variable's; "" is none.  Raises ConfigError."""
    place = str(file) if file else CLIENT_VARIABLE
    entries = _entries(private_text(file) if file else environ.get(CLIENT_VARIABLE, ""))
    found = _KEY.fullmatch(entries[0]) if entries else None
    if found is None and (file or entries):
        raise ConfigError(f"{place}: what is there is no key. A server takes {ALLOWED}.")
    return found[2] if found else ""


def _entries(text: str) -> list[str]:
    return [entry for part in re.split(r"[,\r\n]", text) if (entry := part.strip())]
