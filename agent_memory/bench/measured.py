"""What was measured: a value for each round and server, so that rounds can be compared in pairs.

Knows no server and no unit's meaning.  Plain values.  Main thread.
"""

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

At = Mapping[str, str | int]
"""Under which circumstances: {"prompt": "identical", "tokens": 2048}."""


@dataclass(slots=True)
class Measured:
    """One thing at all servers that took part.

    `values`: by a server's name, one for each round, and the same place is the same round.
    `limit`: what this machine would need, or could do, if nothing but the work itself were done.
    """

    name: str
    at: dict[str, str | int]
    unit: str
    more_is_better: bool = False
    values: dict[str, list[float]] = field(default_factory=dict)
    limit: float | None = None

    def median(self, server: str) -> float:
        return statistics.median(self.values[server])

    def best(self, servers: list[str]) -> str | None:
        """Whose median is best of these; None if none of them took part."""
        there = [server for server in servers if self.values.get(server)]
        if not there:
            return None
        return (max if self.more_is_better else min)(there, key=self.median)

    def ratios(self, this: str, that: str) -> list[float]:
        """Round by round; rounds in which that one is 0 are left out."""
        pairs = zip(self.values[this], self.values[that], strict=True)
        return [a / b for a, b in pairs if b]

    def as_json(self) -> dict[str, Any]:
        medians = {server: self.median(server) for server in self.values}
        return {
            "name": self.name,
            "at": self.at,
            "unit": self.unit,
            "more_is_better": self.more_is_better,
            "limit": self.limit,
            "median": medians,
            "values": self.values,
        }


def of_json(data: Mapping[str, Any]) -> Measured:
    return Measured(
        data["name"],
        dict(data["at"]),
        data["unit"],
        data["more_is_better"],
        {server: list(values) for server, values in data["values"].items()},
        data["limit"],
    )


class Notes:
    """What one part of a run has measured so far, in the order in which it first was."""

    def __init__(self) -> None:
        self._all: dict[tuple[str, tuple[tuple[str, str | int], ...]], Measured] = {}

    def __iter__(self) -> Iterator[Measured]:
        return iter(self._all.values())

    def add(
        self,
        name: str,
        at: At,
        unit: str,
        server: str,
        value: float,
        *,
        more_is_better: bool = False,
    ) -> None:
        """One more round of this at this server."""
        key = name, tuple(at.items())
        if key not in self._all:
            self._all[key] = Measured(name, dict(at), unit, more_is_better)
        self._all[key].values.setdefault(server, []).append(value)

    def limit(self, name: str, at: At, value: float) -> None:
        self._all[name, tuple(at.items())].limit = value
