"""Which agent has been given how much of the engine lately, so that all get alike.

What is given is rows computed.  `_now` is what an agent would have been given that was there all
the time and got as much as everyone: it grows by a step's rows divided by the agents present.  Who
sends a request counts from `_now` at least, so that absence saves nothing up; who had more than
that waits until `_now` has caught up, which it does in bounded time whoever else comes.

All anonymous requests of a tenant count as one agent.  No clock; pure.  Engine thread only.
"""

from collections.abc import Hashable

TURN_ROWS = 1024
"""Agents take turns of so many rows: prompts shorter than that are computed one after another."""


class Shares:
    def __init__(self) -> None:
        self._given: dict[Hashable, float] = {}
        self._present: dict[Hashable, int] = {}  # requests here, by agent
        self._now = 0.0

    def come(self, agent: Hashable) -> None:
        self._present[agent] = self._present.get(agent, 0) + 1
        self._given[agent] = max(self._given.get(agent, 0.0), self._now)

    def leave(self, agent: Hashable) -> None:
        """When nobody is left, nobody owes anybody anything."""
        self._present[agent] -= 1
        if not self._present[agent]:
            del self._present[agent]
        if not self._present:
            self._given.clear()
            self._now = 0.0
        elif len(self._given) > 2 * len(self._present) + 64:
            self._forget()

    def _forget(self) -> None:
        """Those who are not here and have no more than they would come back to."""
        here, now = self._present, self._now
        self._given = {a: given for a, given in self._given.items() if a in here or given > now}

    def give(self, agent: Hashable, num_rows: int) -> None:
        self._given[agent] += num_rows
        self._now += num_rows / len(self._present)

    def turn(self, agent: Hashable) -> int:
        """Lower goes first."""
        return int(self._given[agent] // TURN_ROWS)

    def check(self) -> None:
        assert self._present.keys() <= self._given.keys()
        assert all(count > 0 for count in self._present.values())
        assert self._present or not self._given
