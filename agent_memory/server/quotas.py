"""How much one agent may ask: so many requests at once, and so many a minute.

An agent has `per_minute` requests in hand; each takes one, and one comes back every
60 / `per_minute` seconds.  All without a name are one agent.  Event loop.
"""

import math
import time
from collections import Counter
from collections.abc import Callable

from agent_memory.errors import TooManyRequests

MINUTE_S = 60.0
AT_ONCE_RETRY_S = 1
SWEPT_ABOVE = 1024


class Quotas:
    """None: as many as it likes."""

    def __init__(
        self,
        at_once: int | None = None,
        per_minute: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._at_once = at_once
        self._per_minute = per_minute
        self._clock = clock
        self._inside: Counter[str | None] = Counter()
        self._all_back: dict[str | None, float] = {}
        """When an agent will have all in hand again; one that is not here has."""

    def enter(self, agent: str | None) -> Callable[[], None]:
        """What is returned is to be called when the request has ended.  Raises TooManyRequests."""
        if self._at_once is not None and self._inside.get(agent, 0) >= self._at_once:
            raise TooManyRequests(
                f"{_named(agent)} has {self._at_once} requests waiting or running, which is the "
                "limit. Wait until one has ended, or raise --agent-requests.",
                AT_ONCE_RETRY_S,
            )
        if self._per_minute is not None:
            self._take(agent, self._per_minute)
        self._inside[agent] += 1
        return lambda: self._leave(agent)

    def _take(self, agent: str | None, per_minute: int) -> None:
        now = self._clock()
        all_back = max(self._all_back.get(agent, now), now) + MINUTE_S / per_minute
        early_s = all_back - now - MINUTE_S
        if early_s > 1e-6:
            raise TooManyRequests(
                f"{_named(agent)} may ask {per_minute} times a minute and has. Wait, or raise "
                "--agent-requests-per-minute.",
                math.ceil(early_s),
            )
        self._all_back[agent] = all_back
        if len(self._all_back) > SWEPT_ABOVE:
            self._all_back = {name: end for name, end in self._all_back.items() if end > now}

    def _leave(self, agent: str | None) -> None:
        self._inside[agent] -= 1
        assert self._inside[agent] >= 0
        if not self._inside[agent]:
            del self._inside[agent]

    @property
    def num_known(self) -> int:
        return len(self._inside.keys() | self._all_back.keys())


def _named(agent: str | None) -> str:
    return f"Agent '{agent}'" if agent else "Whoever gives no name"
