"""Measured figures beside what they should be, as a table for people."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

console = Console()


@dataclass(frozen=True)
class Figure:
    """A measured ratio or time beside what it should be at most, or at least.

    `spread`: of single values.  No target: for comparison only.
    """

    name: str
    value: float
    target: float | None
    spread: tuple[float, float]
    unit: str = "x"
    at_least: bool = False

    @property
    def met(self) -> bool:
        if self.target is None:
            return True
        return self.value >= self.target if self.at_least else self.value <= self.target

    @property
    def wanted(self) -> str:
        if self.target is None:
            return ""
        return f"{'≥' if self.at_least else '≤'} {self.target:.3g} {self.unit}"


def figure(
    name: str,
    values: Sequence[float],
    target: float | None = None,
    unit: str = "x",
    *,
    at_least: bool = False,
) -> Figure:
    spread = min(values), max(values)
    return Figure(name, statistics.median(values), target, spread, unit, at_least)


def ratios(these: Sequence[float], those: Sequence[float]) -> list[float]:
    """Pair by pair."""
    return [a / b for a, b in zip(these, those, strict=True)]


def show(figures: Sequence[Figure]) -> None:
    table = Table("measured", "median", "spread", "target", "")
    for f in figures:
        low, high = f.spread
        verdict = "[green]met[/]" if f.met else "[red]missed[/]"
        table.add_row(
            f.name,
            f"{f.value:.3g} {f.unit}",
            f"{low:.3g} to {high:.3g}",
            f.wanted,
            verdict if f.wanted else "",
        )
    console.print(table)


def report(figures: Sequence[Figure], file: Path | None) -> int:
    """Show them, write them to the file if there is one -> the exit status."""
    show(figures)
    if file:
        file.write_text(json.dumps([asdict(f) for f in figures], indent=1))
    return 0 if all(f.met for f in figures) else 1
