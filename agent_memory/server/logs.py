"""Log lines on stderr: ours, and in the same form those of asyncio and Hypercorn.

No prompt, no answer and no key is ever logged.  Called once, before anything else logs.
"""

import logging
import sys
from contextlib import suppress
from typing import Any, TextIO, cast

import structlog


def configure(log_format: str) -> None:
    """`log_format`: console or json, one line per event either way but for tracebacks."""
    to_json = log_format == "json"
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *(_json() if to_json else _console()),
        ],
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, Lines())),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(handlers=[ToStructlog()], level=logging.WARNING, force=True)


def _json() -> list[Any]:
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]


def _console() -> list[Any]:
    # Not the prettier traceback: it shows local variables, and prompts are in them.
    plain = structlog.dev.plain_traceback
    return [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]


class Lines:
    """Standard error.  Its reader may have gone, or its disk be full: then lines are lost, and no
    request, no step and no shutdown with them."""

    def write(self, text: str) -> None:
        with suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()


class ToStructlog(logging.Handler):
    """Hands the standard library's records on."""

    def emit(self, record: logging.LogRecord) -> None:
        structlog.get_logger(record.name).log(
            record.levelno, record.getMessage(), logger=record.name, exc_info=record.exc_info
        )
