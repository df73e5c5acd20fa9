"""The files that a run leaves, each whole or not at all.

    latest.json    everything, value by value; the one before it becomes previous.json
    latest.md      the same as tables
    PART.svg       the same as plots, where matplotlib is installed

Loads what draws only if it can.  Main thread.
"""

import importlib
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agent_memory.bench import report, tables
from agent_memory.errors import UsageError

PLOTS = "agent_memory.bench.plots"
NO_PLOTS = "No plots without matplotlib: pip install 'agent-memory[plots]'"


def place(folder: Path) -> Path:
    """There, before anything is measured.  Raises UsageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / ".writable", "")
        (folder / ".writable").unlink()
    except OSError as error:
        raise UsageError(f"--out: nothing can be written there: {error}") from error
    return folder


def write(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """-> what was written."""
    latest = folder / "latest.json"
    if latest.exists():
        _write(folder / "previous.json", latest.read_text("utf-8"))
    _write(latest, as_json(results))
    plots = draw(results, folder)
    _write(folder / "latest.md", report.markdown(results, plots))
    return [latest, folder / "latest.md", *plots]


def as_json(results: Mapping[str, Any]) -> str:
    return json.dumps(results, indent=1, ensure_ascii=False) + "\n"


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Those of an earlier run do not stay beside other figures."""
    for part in tables.ORDER:
        (folder / f"{part}.svg").unlink(missing_ok=True)
    if not can_draw():
        return []
    drawn: list[Path] = importlib.import_module(PLOTS).draw(results, folder)
    return drawn


def _write(file: Path, text: str) -> None:
    unfinished = file.with_name(f"{file.name}.unfinished")
    unfinished.write_text(text, "utf-8")
    os.replace(unfinished, file)
