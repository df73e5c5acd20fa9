"""run/fault.log: the stacks of every thread, where the process could say nothing else any more.

Written by Python's faulthandler: at a crash in native code, at SIGUSR1, when the engine stands
still, and before the last resort.  Stacks name files and lines of code, never what was said.  What
an earlier process left is read once, by the next.  Any thread.
"""

import faulthandler
import os
import signal
import sys
from pathlib import Path
from typing import TextIO

import structlog

MOST_TOLD = 16_384
"""Characters of it, the last."""

log = structlog.get_logger(__name__)


class FaultLog:
    """`previous`: what the last process left."""

    def __init__(self, run: Path) -> None:
        self.path = run / "fault.log"
        self.previous = ""
        self._file: TextIO = sys.stderr
        try:
            self.previous = self._set_aside()
            self._file = open(self.path, "w", encoding="utf-8", opener=_private)
        except OSError as error:
            log.warning("fault_log_not_written", file=str(self.path), error=error.strerror)
        faulthandler.enable(self._file, all_threads=True)
        faulthandler.register(signal.SIGUSR1, self._file, all_threads=True)

    def write_stacks(self, why: str) -> None:
        self._file.write(f"{why}\n")
        self._file.flush()
        faulthandler.dump_traceback(self._file, all_threads=True)

    def exit_after(self, seconds: float) -> None:
        """Stacks and the end, from a thread that needs no Python: where one that holds the
        interpreter never lets go."""
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._file)

    def _set_aside(self) -> str:
        """Kept until the next one, for who wants to read all of it."""
        if not self.path.exists() or not self.path.stat().st_size:
            return ""
        self.path.replace(self.path.with_name("fault.log.previous"))
        return self.path.with_name("fault.log.previous").read_text("utf-8", "replace")[-MOST_TOLD:]


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
