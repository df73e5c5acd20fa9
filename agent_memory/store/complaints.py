"""Failures told without becoming a flood, or a failure themselves.

Knows how to count and log.  Any thread.
"""

import time
import traceback
from contextlib import suppress

import structlog
from prometheus_client import Counter

LOG_INTERVAL_S = 60.0

log = structlog.get_logger(__name__)


class Complaints:
    """Counts every complaint and logs the first of its kind in a minute."""

    def __init__(self, event: str, counter: Counter | None = None) -> None:
        self._event = event
        self._counter = counter
        self._last_logged: dict[str, float] = {}

    def add(self, kind: str, **details: object) -> None:
        if self._counter:
            self._counter.labels(kind).inc()
        now = time.monotonic()
        last = self._last_logged.get(kind)
        if last is None or now - last >= LOG_INTERVAL_S:
            self._last_logged[kind] = now
            with suppress(OSError, ValueError):  # the log may lie on the same full disk
                log.error(self._event, kind=kind, **details)


def trace(error: BaseException) -> str:
    """Where it came from, without the values of variables: they hold what people wrote."""
    return "".join(traceback.format_exception(error))
