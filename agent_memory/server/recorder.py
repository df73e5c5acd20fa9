"""What is told of this process to those who outlive it: the next server, systemd, an operator.

    run/starts.jsonl   which phase it is in, every minute again       store/starts.py
    run/fault.log      stacks, where it could say nothing else        faults.py
    $NOTIFY_SOCKET     ready, alive, stopping, and how long that takes

Any thread.
"""

import os
import socket
import time
from pathlib import Path

import structlog

from agent_memory.processes import boot_id
from agent_memory.server.faults import FaultLog
from agent_memory.stages import Stage
from agent_memory.store.starts import Start, Starts

STILL_S = 60.0
MARGIN_S = 10.0

log = structlog.get_logger(__name__)


class Supervisor:
    """systemd, if it started this process with a socket to be told on; else nobody."""

    def __init__(self, address: str) -> None:
        self._socket: socket.socket | None = None
        self._address = "\0" + address[1:] if address.startswith("@") else address
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)

    def tell(self, **what: object) -> None:
        if self._socket is None:
            return
        text = "\n".join(f"{name}={value}" for name, value in what.items())
        try:
            self._socket.sendto(text.encode(), self._address)
        except OSError as error:
            log.warning("supervisor_not_told", error=error.strerror)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class Recorder:
    def __init__(self, run: Path) -> None:
        self.faults = FaultLog(run)
        self.starts = Starts(run)
        self._supervisor = Supervisor(os.environ.get("NOTIFY_SOCKET", ""))
        self._said_at = time.monotonic()
        self._tell_previous()

    def _tell_previous(self) -> None:
        previous = self.starts.previous
        if previous is not None and not previous.clean:
            log.warning("previous_run", unclean=True, **_figures(previous))
        if self.faults.previous:
            log.warning("previous_faults", text=self.faults.previous)

    def phase(self, phase: str, step: str) -> None:
        self.starts.note(phase, step)
        self._supervisor.tell(STATUS=f"{phase} {step}".strip())

    def ready(self) -> None:
        """It answers, if only with how far it is."""
        self._supervisor.tell(READY=1)

    def stopping(self) -> None:
        self._supervisor.tell(STOPPING=1)

    def stage(self, stage: Stage, budget_s: float) -> None:
        self.starts.note(stage)
        extended = round(1e6 * (budget_s + MARGIN_S))
        self._supervisor.tell(STATUS=stage, EXTEND_TIMEOUT_USEC=extended)

    def alive(self) -> None:
        """Called again and again by whoever would stand still if the event loop did."""
        self._supervisor.tell(WATCHDOG=1)
        if time.monotonic() - self._said_at >= STILL_S:
            self._said_at = time.monotonic()
            self.starts.still()

    def end(self, status: int) -> None:
        self.starts.end(status)
        self._supervisor.close()


def _figures(start: Start) -> dict[str, object]:
    return {
        "pid": start.pid,
        "phase": start.phase,
        "step": start.step,
        "exit": start.exit,
        "ran_s": round(start.last - start.began, 1),
        "ended_s_ago": round(time.time() - start.last, 1),
        "peak_rss_bytes": start.peak_rss_bytes,
        "rebooted_since": start.boot != boot_id(),
    }
