"""Which model a folder holds: a digest over every byte that its KV depends on.

Reading tens of gigabytes again at every start would take longer than loading them.  So a file's
digest is kept, under what the system says of the file; it holds as long as all of that is the same.
Knows nothing of what is in the files.  Any thread.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import structlog
import xxhash

log = structlog.get_logger(__name__)

MOST_KEPT = 1000
_writing = threading.Lock()
_SETTLED_NS = 2_000_000_000
"""A file may change again within the grain of its time stamp: one as young as this is not kept."""


Tell = Callable[[int], object]
"""Told every so often how many bytes have been read; it may raise to end it."""


def model_digest(folder: Path, kept: Path | None = None, tell: Tell = lambda _: None) -> str:
    """Changes with any byte of weights, config and tokenizer.

    `kept`: the file of digests from before, made and replaced here; of odd contents it is ignored.
    """
    known = _read(kept) if kept else {}
    found: dict[str, str] = {}
    whole = xxhash.xxh3_128()
    files = [*folder.glob("model*.safetensors"), folder / "config.json", folder / "tokenizer.json"]
    for file in sorted(files):
        identity = _identity(file)
        digest = known.get(identity) or _digest(file, tell)
        whole.update(f"{file.name}:{file.stat().st_size}:{digest}\n".encode())
        if identity == _identity(file) and _settled(file):
            found[identity] = digest
    if kept and not found.keys() <= known.keys():
        with _writing:
            _write(kept, _read(kept) | found)
    return whole.hexdigest()


def _identity(file: Path) -> str:
    """What changes whenever the file does; in the hub's cache, of the file a link leads to."""
    stat = file.stat()
    facts = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return ":".join(map(str, facts))


def _settled(file: Path) -> bool:
    stat = file.stat()
    return max(stat.st_mtime_ns, stat.st_ctime_ns) < time.time_ns() - _SETTLED_NS


def _digest(file: Path, tell: Tell) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb", buffering=0) as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
            tell(stream.tell())
    return digest.hexdigest()


def _read(kept: Path) -> dict[str, str]:
    try:
        found = json.loads(kept.read_bytes())
        good = all(len(bytes.fromhex(digest)) == 16 for digest in found.values())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        log.warning("digests_ignored", reason=f"{type(error).__name__}: {error}")
        return {}
    return found if good else {}


def _write(kept: Path, digests: dict[str, str]) -> None:
    """The newest MOST_KEPT, whole or not at all; that they cannot be kept is told and no more."""
    new = kept.with_suffix(".new")
    text = json.dumps(dict(list(digests.items())[-MOST_KEPT:]), indent=0)
    try:
        with new.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(kept)
    except OSError as error:
        log.warning("digests_not_kept", reason=str(error))
