"""How commands talk: tables and words for people, one JSON object for programs.

What was asked for goes to standard output, progress to standard error and only if somebody looks at
it.  Main thread.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich import filesize
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

PIPED_COLUMNS = 200
"""Where nobody said how wide it is, as in a pipe or a log, tables are as wide as they like."""


def output_console() -> Console:
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPED_COLUMNS
    return Console(highlight=False, width=width)


class Terminal:
    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self._out = output_console()
        self._err = Console(stderr=True, highlight=False)

    def result(self, value: Any) -> None:
        """For programs."""
        sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def say(self, text: str = "", style: str = "") -> None:
        self._out.print(text, style=style, markup=False, soft_wrap=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Columns whose name begins with > are aligned to the right."""
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for name in columns:
            right = name.startswith(">")
            table.add_column(
                name.removeprefix(">"),
                justify="right" if right else "left",
                overflow="fold",
                no_wrap=right,
            )
        for row in rows:
            table.add_row(*map(Text, row))
        self._out.print(table)

    def counting(self) -> Progress:
        return self._progress(MofNCompleteColumn())

    def transferring(self) -> Progress:
        return self._progress(DownloadColumn())

    def _progress(self, column: MofNCompleteColumn | DownloadColumn) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(20),
            column,
            console=self._err,
            transient=True,
            disable=not self._err.is_terminal,
        )


def visible(text: str) -> str:
    """Without what a terminal would take for a command to it."""
    return "".join(c if c.isprintable() or c == "\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def size(num_bytes: int) -> str:
    return filesize.decimal(num_bytes)


def number(value: int) -> str:
    return f"{value:,}"


def ago(seconds_since_1970: float) -> str:
    """Roughly, as people say it."""
    seconds = max(0.0, time.time() - seconds_since_1970)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"
