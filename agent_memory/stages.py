"""The stages of the server's end and their seconds: what a supervisor must wait for.

Numbers only.  Any thread.
"""

import math
from enum import StrEnum

EXIT_CLEAN = 0
EXIT_INCOMPLETE = 70


class Stage(StrEnum):
    STOP_ADMISSION = "stop_admission"
    DRAIN = "drain"
    PERSIST = "persist"
    STOP_ENGINE = "stop_engine"
    UNLOAD_MODEL = "unload_model"
    RELEASE_MEMORY = "release_memory"


# Seconds, in order.  The drain time-out comes on top of the drain's.
BUDGETS_S = {
    Stage.STOP_ADMISSION: 0.5,
    Stage.DRAIN: 1.5,
    Stage.PERSIST: 5.0,
    Stage.STOP_ENGINE: 2.0,
    Stage.UNLOAD_MODEL: 1.5,
    Stage.RELEASE_MEMORY: 1.5,
}
STAGES = tuple(BUDGETS_S)

# Both after the drain time-out.  The first is above the sum of the budgets by the time in which
# connections end, and below the second by the time in which the process does.
HARD_DEADLINE_S = 14.5
PROMISE_S = 15.0

RESERVE_S = 20.0


def supervisor_s(drain_timeout_s: float) -> int:
    """How long a supervisor should wait before it kills: more than the server promises to take."""
    return math.ceil(drain_timeout_s + max(sum(BUDGETS_S.values()), PROMISE_S) + RESERVE_S)
