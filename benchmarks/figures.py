"""Measured figures beside what they should be at most, as a table for people."""

import statistics
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

console = Console()


@dataclass(frozen=True)
class Figure:
    """A measured ratio or time beside what it should be at most.  `spread`: of single values."""

    name: str
    value: float
    target: float
    spread: tuple[float, float]
    unit: str = "x"

    @property
    def met(self) -> bool:
        return self.value <= self.target


def figure(name: str, values: list[float], target: float, unit: str = "x") -> Figure:
    return Figure(name, statistics.median(values), target, (min(values), max(values)), unit)


def show(figures: list[Figure]) -> None:
    table = Table("measured", "median", "spread", "at most", "")
    for f in figures:
        low, high = f.spread
        verdict = "[green]met[/]" if f.met else "[red]missed[/]"
        table.add_row(
            f.name,
            f"{f.value:.3g} {f.unit}",
            f"{low:.3g} to {high:.3g}",
            f"{f.target:.3g} {f.unit}",
            verdict,
        )
    console.print(table)
