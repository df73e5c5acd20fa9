"""run/starts.jsonl: every start of the server here, how far it came and how it ended.

One line for each phase a server enters; while a phase lasts its line is written again every minute,
with the time and the memory.  So the line on which a process stopped writing says where it died.
Nothing here is worth failing for: what cannot be written is told once.  Any thread.

    three servers that ended badly, started within ten minutes  ─►  the next loads no model
    until half an hour after the last of them, or until run/reset is newer than it
"""

import json
import os
import resource
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import structlog

from agent_memory.processes import boot_id
from agent_memory.stages import EXIT_INCOMPLETE

NUM_KEPT = 20
"""Starts."""
NUM_BAD = 3
WITHIN_S = 600.0
PAUSE_S = 1800.0

STARTED = "started"
HELD = "crash_loop"
STOPPED = "stopped"

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Start:
    """Times are of the wall clock, in seconds.  `exit` is None unless it ended in an orderly way,
    well or not."""

    run: str
    pid: int
    boot: str
    began: float
    last: float
    phase: str
    step: str
    peak_rss_bytes: int
    exit: int | None = None

    @property
    def clean(self) -> bool:
        return self.exit is not None and self.exit != EXIT_INCOMPLETE

    @property
    def bad(self) -> bool:
        """One that loaded nothing says nothing of what loading does."""
        return not self.clean and self.phase != HELD


def read(path: Path) -> list[Start]:
    """In order.  What is no line of ours, or a torn one, is passed over.  Raises OSError."""
    starts: dict[str, Start] = {}
    for line in _lines(path):
        known = starts.get(line["run"])
        if known is None:
            if line["phase"] == STARTED:
                starts[line["run"]] = Start(
                    *(line["run"], line["pid"], line["boot"], line["at"], line["at"]),
                    *(STARTED, "", line["peak_rss_bytes"]),
                )
            continue
        if line["phase"] == STOPPED:
            known.exit = line["exit"]
        else:
            known.phase, known.step = line["phase"], line["step"]
        known.last, known.peak_rss_bytes = line["at"], line["peak_rss_bytes"]
    return list(starts.values())


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text("utf-8", "replace")
    except FileNotFoundError:
        return
    for written in text.splitlines():
        try:
            line = json.loads(written)
        except ValueError:
            continue
        if isinstance(line, dict) and all(
            name in line and isinstance(line[name], kind) for name, kind in _FIELDS.items()
        ):
            yield line


_FIELDS = {
    "run": str,
    "at": int | float,
    "phase": str,
    "step": str,
    "pid": int,
    "boot": str,
    "exit": int | None,
    "peak_rss_bytes": int,
}


def num_unclean(starts: list[Start], now: float) -> int:
    """In the last ten minutes."""
    return sum(start.bad and 0 <= now - start.began <= WITHIN_S for start in starts)


def held_for_s(starts: list[Start], reset: float, now: float) -> float:
    """How long nothing should be loaded yet; 0 if it may be.  `reset`: bad ends before it are
    forgiven."""
    bad = [start for start in starts if start.bad and start.last > reset]
    last = bad[-NUM_BAD:]
    if len(last) < NUM_BAD or not 0 <= last[-1].began - last[0].began <= WITHIN_S:
        return 0.0
    return max(0.0, min(PAUSE_S, last[-1].last + PAUSE_S - now))


def forgive(run: Path) -> None:
    """Raises OSError."""
    (run / "reset").write_text(f"{time.time()}\n")


def read_reset(run: Path) -> float:
    try:
        return float((run / "reset").read_text())
    except (OSError, ValueError):
        return 0.0


class Starts:
    """This start, and those before it."""

    def __init__(self, run: Path) -> None:
        self._folder = run
        self._path = run / "starts.jsonl"
        self._run = secrets.token_hex(8)
        self._lock = Lock()
        self._told = False
        self._phase = ""
        self._step = ""
        self._fd = -1
        self._line_at = 0
        self.before: list[Start] = []
        try:
            self.before = read(self._path)[-NUM_KEPT:]
            self._keep(self.before)
            self._fd = os.open(self._path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            self._line_at = os.fstat(self._fd).st_size
        except OSError as error:
            self._complain(error)
        self.note(STARTED)

    @property
    def previous(self) -> Start | None:
        return self.before[-1] if self.before else None

    def held_for_s(self) -> float:
        """Reads one small file."""
        return held_for_s(self.before, read_reset(self._folder), time.time())

    def num_unclean(self) -> int:
        return num_unclean(self.before, time.time())

    def note(self, phase: str, step: str = "") -> None:
        """A phase begins, or goes on with another step."""
        with self._lock:
            self._write(phase, step, None)

    def still(self) -> None:
        """The phase lasts."""
        with self._lock:
            self._write(self._phase, self._step, None)

    def end(self, status: int) -> None:
        """The process is about to exit with this."""
        with self._lock:
            self._write(STOPPED, "", status)
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _write(self, phase: str, step: str, status: int | None) -> None:
        """A line of the same phase replaces the last."""
        if self._fd < 0:
            return
        line = self._text(self._run, phase, step, status)
        try:
            if phase == self._phase:
                os.ftruncate(self._fd, self._line_at)
            self._line_at = os.fstat(self._fd).st_size
            os.pwrite(self._fd, line, self._line_at)
        except OSError as error:
            self._complain(error)
        self._phase, self._step = phase, step

    def _text(self, run: str, phase: str, step: str, status: int | None) -> bytes:
        line = {
            "run": run,
            "at": int(1000 * time.time()) / 1000,  # never later than now: that would not count
            "phase": phase,
            "step": step,
            "pid": os.getpid(),
            "boot": boot_id(),
            "exit": status,
            "peak_rss_bytes": peak_rss_bytes(),
        }
        return json.dumps(line).encode() + b"\n"

    def _keep(self, starts: list[Start]) -> None:
        """The file anew, with three lines for each of these: it does not grow for ever."""
        new = self._path.with_name("starts.jsonl.new")
        with open(new, "w", encoding="utf-8", opener=_private) as file:
            file.writelines(text for start in starts for text in _texts(start))
        new.replace(self._path)

    def _complain(self, error: OSError) -> None:
        if not self._told:
            log.warning("starts_not_written", file=str(self._path), error=error.strerror)
            self._told = True


def _texts(start: Start) -> Iterator[str]:
    """The least lines that are read as this start."""
    line = {"run": start.run, "pid": start.pid, "boot": start.boot, "step": "", "exit": None}
    line |= {"peak_rss_bytes": start.peak_rss_bytes}
    yield json.dumps(line | {"at": start.began, "phase": STARTED}) + "\n"
    if start.phase != STARTED:
        yield json.dumps(line | {"at": start.last, "phase": start.phase, "step": start.step}) + "\n"
    if start.exit is not None:
        yield json.dumps(line | {"at": start.last, "phase": STOPPED, "exit": start.exit}) + "\n"


def peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
