"""What systems print about themselves, as numbers.

Pure: a text in, what is understood of it out, nothing where it is not.  Bytes.  Any thread.
"""

import re
from dataclasses import dataclass
from pathlib import Path

_LISTEN = "0A"


@dataclass(frozen=True, slots=True)
class Memory:
    """`wired`: what the system cannot move or take back; None where there is no such word."""

    total: int
    available: int
    wired: int | None = None


@dataclass(frozen=True, slots=True)
class Listener:
    pid: int
    command: str


def meminfo(text: str) -> Memory | None:
    """Linux's /proc/meminfo."""
    rows = dict(re.findall(r"^(\w+):\s+(\d{1,15}) kB$", text, re.MULTILINE))
    if "MemTotal" not in rows or "MemAvailable" not in rows:
        return None
    return Memory(int(rows["MemTotal"]) * 1024, int(rows["MemAvailable"]) * 1024)


def vm_stat(text: str, total: int) -> Memory | None:
    """macOS's vm_stat, which counts pages and names their size in its first line."""
    size = re.search(r"page size of (\d{1,9}) bytes", text)
    rows = dict(re.findall(r'^"?([^":\n]{1,80})"?:\s+(\d{1,15})\.?\s*$', text, re.MULTILINE))
    free = ("Pages free", "Pages inactive", "Pages speculative", "Pages purgeable")
    if size is None or "Pages wired down" not in rows or not total:
        return None
    page = int(size[1])
    available = page * sum(int(rows.get(name, 0)) for name in free)
    wired = page * int(rows["Pages wired down"])
    return Memory(total, min(available, total), wired) if page and wired <= total else None


def sysctl(text: str) -> dict[str, str]:
    """Lines of `name: value`, as `sysctl a b c` prints them, or `name = value`."""
    return dict(re.findall(r"^([\w.]{1,80})(?:: | = )(.{0,400})$", text, re.MULTILINE))


def whole(text: str) -> int:
    """0 if it is no whole number."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0


def linux_mounts(text: str) -> list[tuple[Path, str]]:
    """/proc/mounts: (where, kind of file system)."""
    rows = [line.split() for line in text.splitlines()]
    return [(Path(_unescaped(row[1])), row[2]) for row in rows if len(row) >= 3]


def macos_mounts(text: str) -> list[tuple[Path, str]]:
    """The same from `mount`."""
    rows = re.findall(r"^.{1,1000}? on (/.{0,1000}) \(([\w.+-]{1,40})[,)]", text, re.MULTILINE)
    return [(Path(where), kind) for where, kind in rows]


def kind_at(path: Path, mounts: list[tuple[Path, str]]) -> str:
    """The kind of the innermost one around `path`, the last of those mounted there; "" if none."""
    around = [(len(where.parts), kind) for where, kind in mounts if path.is_relative_to(where)]
    deepest = max((depth for depth, _ in around), default=0)
    return next((kind for depth, kind in reversed(around) if depth == deepest), "")


def listening_inodes(text: str, port: int) -> set[str]:
    """/proc/net/tcp or tcp6: the sockets that listen there."""
    rows = [line.split() for line in text.splitlines()]
    return {
        row[9]
        for row in rows
        if len(row) > 9 and row[3] == _LISTEN and row[1].rpartition(":")[2] == f"{port:04X}"
    }


def lsof(text: str) -> Listener | None:
    """The first process of `lsof -Fpc`."""
    found = re.search(r"^p(\d{1,9})$(?:\n(?!p).*)*?\nc(.{0,400})$", text, re.MULTILINE)
    return Listener(int(found[1]), found[2]) if found else None


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), text)
