"""How much disk the store may use and wear, and what it still may.

Knows the settings' meaning and how to ask the system.  Knows nothing of blocks.  Writer thread.
"""

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from agent_memory.store.days import Days

GIB = 1 << 30
AUTO_DISK_BYTES = 50 * GIB
AUTO_MIN_FREE_BYTES = 10 * GIB
SLACK = 50
"""When there is no room, this part of it is made beyond what is needed, to do so less often."""
NO_USE_S = 600.0


def today() -> int:
    return date.today().toordinal()


def free_bytes(path: Path) -> int:
    """Raises OSError."""
    return shutil.disk_usage(path).free


@dataclass(frozen=True, slots=True)
class Limits:
    """The settings of these names.  None: `disk_bytes` and `min_free_bytes` follow from the size
    of the disk, the others do not limit.  The last two are the system's answers."""

    disk_bytes: int | None = None
    min_free_bytes: int | None = None
    max_age_days: int | None = 90
    daily_write_bytes: int | None = 50 * GIB
    today: Callable[[], int] = today
    free_bytes: Callable[[Path], int] = free_bytes


@dataclass(frozen=True, slots=True)
class Lack:
    """Bytes that must go from the disk, and the setting that says so."""

    num_bytes: int
    reason: str


class Budget:
    """Raises OSError if the system cannot tell the size of the disk."""

    def __init__(self, limits: Limits, path: Path, days: Days) -> None:
        disk = shutil.disk_usage(path).total
        auto, auto_free = min(disk // 10, AUTO_DISK_BYTES), min(disk // 20, AUTO_MIN_FREE_BYTES)
        self.disk_bytes = auto if limits.disk_bytes is None else limits.disk_bytes
        self._min_free = auto_free if limits.min_free_bytes is None else limits.min_free_bytes
        self._limits = limits
        self._path = path
        self.days = days
        self._no_use_until = 0.0

    def begin(self, clock: int) -> bool:
        """Says whether a new day has begun."""
        return self.days.begin(self._limits.today(), clock)

    def free(self) -> int:
        try:
            return self._limits.free_bytes(self._path)
        except OSError:
            return sys.maxsize  # whatever is wrong, writing will tell

    def lack(self, used: int, coming: int) -> Lack | None:
        """What is missing for `coming` bytes when `used` are on disk."""
        over = used + coming - self.disk_bytes
        short = self._min_free + coming - self.free()
        if short > max(0, over) and time.monotonic() >= self._no_use_until:
            return Lack(short, "min_free_bytes")
        return Lack(over + self.disk_bytes // SLACK, "disk_bytes") if over > 0 else None

    def made_room(self, num_bytes: int, gained: int) -> None:
        """So much was deleted, and so much more is free.

        Where a disk keeps what is deleted, in snapshots, deleting all would not help: then not the
        store is at fault, and it goes on deleting nothing for a while.
        """
        if gained < num_bytes // 2:
            self._no_use_until = time.monotonic() + NO_USE_S

    def refuses(self, num_bytes: int, used: int) -> str | None:
        """The setting that forbids writing so much more when `used` are on disk."""
        daily = self._limits.daily_write_bytes
        if daily is not None and self.days.bytes_today + num_bytes > daily:
            return "daily_write_bytes"
        if used + num_bytes > self.disk_bytes:
            return "disk_bytes"
        return "min_free_bytes" if self.free() - num_bytes < self._min_free else None

    def keeps_floor(self, num_bytes: int) -> bool:
        """Whether enough stays free with so many bytes more on the disk, whatever they are."""
        return self.free() - num_bytes >= self._min_free

    def expired(self) -> int:
        """Blocks last used at this clock or before are too old; -1 if none is."""
        age = self._limits.max_age_days
        return self.days.before(age) if age is not None else -1
