"""What the engine is at, in a word, and what a request is told while that is not serving.

    STARTING ─► LOADING ─► READY ──► DRAINING ─► STOPPED
       └► HELD ───┘ └────► FAILED ─────┘

HELD: it has failed too often lately and loads nothing until that is some time ago.  Any thread.
"""

from collections.abc import Callable, Mapping
from enum import StrEnum

from agent_memory.errors import AgentMemoryError, Unavailable

Note = Callable[[str, str], object]
"""Told of a new phase, and of what is done in it."""


class Phase(StrEnum):
    STARTING = "starting"
    HELD = "crash_loop"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"
    STOPPED = "stopped"


class LoadCancelled(AgentMemoryError):
    pass


HELD = (
    "The server has ended badly three times within ten minutes, so it loads no model for now. Its "
    "log and run/fault.log say why. 'agent-memory doctor --reset' makes it load at once; after 30 "
    "minutes it tries again by itself."
)


def refusal(phase: Phase, progress: Mapping[str, object], failure: str | None) -> Unavailable:
    """Why there is no model to answer with."""
    if phase is Phase.LOADING:
        said = f"The model is still loading ({dict(progress)}). Try again shortly."
        return Unavailable(said, reason="loading", retry_after=10)
    if phase is Phase.FAILED:
        said = f"The model could not be loaded: {failure}"
        return Unavailable(said, reason="failed", retry_after=60)
    if phase is Phase.HELD:
        return Unavailable(HELD, reason="crash_loop", retry_after=60)
    return Unavailable(
        "The server is shutting down. Try again in a moment.", reason="draining", retry_after=5
    )
