"""Whether the engine thread is alive and gets on with its work.

Written by the engine thread, read by any without asking it: a thread that is stuck answers nobody.
Every field is replaced whole, so there is no lock.  All on the monotonic clock.

    rest ─► work comes ─► turn ─► turn ─► … ─► rest            ended: left, or died
"""

import time
from enum import StrEnum

from agent_memory import failpoint

FLOOR_S = 60.0
"""Less than this without a turn says nothing: kernels are compiled, a machine pages."""
TIMES_P99 = 10
NUM_KEPT = 256
"""Steps whose times are kept."""


class Trouble(StrEnum):
    DEAD = "engine_dead"
    STALLED = "engine_stalled"


class Heartbeat:
    def __init__(self) -> None:
        self.died = False
        self._resting = True
        self._since = self._turned = time.monotonic()
        self._steps_s = [0.0] * NUM_KEPT
        self._num_steps = 0
        self._floor_s = failpoint.seconds("engine.stall", FLOOR_S)

    # the engine thread's

    def turned(self, *, rests: bool) -> None:
        """A turn has ended; `rests` if there is nothing to do until somebody asks for something."""
        self._since = self._turned = time.monotonic()
        self._resting = rests

    def woken(self) -> None:
        if self._resting:
            self._since = time.monotonic()
            self._resting = False

    def stepped(self) -> None:
        """What this turn did was a step."""
        self._steps_s[self._num_steps % NUM_KEPT] = time.monotonic() - self._since
        self._num_steps += 1

    def ended(self, *, as_told: bool) -> None:
        self.died = not as_told
        self._resting = True

    # anybody's

    @property
    def rests(self) -> bool:
        return self._resting

    @property
    def turn_age_s(self) -> float:
        """Since a turn ended last, also at rest."""
        return time.monotonic() - self._turned

    @property
    def limit_s(self) -> float:
        """So long a turn may take."""
        kept = sorted(self._steps_s[: self._num_steps])
        p99_s = kept[len(kept) * 99 // 100] if kept else 0.0
        return max(self._floor_s, TIMES_P99 * p99_s)

    def trouble(self, *, may_stall: bool) -> Trouble | None:
        """`may_stall`: what it is at now is made of turns, as loading a model is not."""
        if self.died:
            return Trouble.DEAD
        working_s = 0.0 if self._resting else time.monotonic() - self._since
        if may_stall and working_s > self._floor_s and working_s > self.limit_s:
            return Trouble.STALLED
        return None
