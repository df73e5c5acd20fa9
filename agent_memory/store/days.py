"""On which days the server ran, and how much it wrote on each.

Knows that a day is a name and not a time: days are ordered by the logical clock that orders uses,
so a clock that jumps adds at most one day for each date it shows, and one that goes back none.
Writer thread.
"""

from dataclasses import dataclass, replace

from agent_memory.store.index import Statement

MOST = 4000


@dataclass(frozen=True, slots=True)
class Day:
    """`date`: its ordinal.  `clock`: uses of that day have a higher one, those before have not."""

    date: int
    clock: int
    bytes_written: int = 0


class Days:
    def __init__(self, days: list[Day]) -> None:
        self._days = sorted(days, key=lambda day: day.clock)
        self._today = 0

    @property
    def bytes_today(self) -> int:
        return next(d.bytes_written for d in self._days if d.date == self._today)

    def begin(self, date: int, clock: int) -> bool:
        """Now is `date`.  Says whether that is a day not seen before."""
        self._today = date
        new = all(day.date != date for day in self._days)
        if new:
            self._days.append(Day(date, clock))
        return new

    def wrote(self, num_bytes: int) -> None:
        self._days = [
            replace(day, bytes_written=day.bytes_written + num_bytes)
            if day.date == self._today
            else day
            for day in self._days
        ]

    def before(self, num_days: int) -> int:
        """The clock before the last `num_days` and this one; -1 if there are not so many."""
        return self._days[-1 - num_days].clock if len(self._days) > num_days else -1

    def rows(self) -> list[Statement]:
        """What of today must be in the index, and what too old to be."""
        today = next(day for day in self._days if day.date == self._today)
        old, self._days = self._days[:-MOST], self._days[-MOST:]
        put = (
            "INSERT INTO days VALUES (?, ?, ?) ON CONFLICT DO UPDATE"
            " SET bytes_written = excluded.bytes_written"
        )
        drop = "DELETE FROM days WHERE date = ?"
        return [
            (put, (today.date, today.clock, today.bytes_written)),
            *((drop, (day.date,)) for day in old if day.date != self._today),
        ]
