"""Named places at which a test makes the program fail or be slow.

    AGENT_MEMORY_FAILPOINTS=shutdown.persist            raises there
    AGENT_MEMORY_FAILPOINTS=shutdown.persist:block      never comes back from there
    AGENT_MEMORY_FAILPOINTS=engine.turn:3               takes 3 seconds there
    AGENT_MEMORY_FAILPOINTS=engine.stall:2              where it is a limit: 2 seconds

Several are separated by commas.  Read at each call; without the variable nothing happens.  Any
thread.
"""

import os
import time

from agent_memory.errors import AgentMemoryError

VARIABLE = "AGENT_MEMORY_FAILPOINTS"
FOR_EVER_S = 1e6


class FailpointReached(AgentMemoryError):
    pass


def failpoint(name: str) -> None:
    asked = _asked(name)
    if asked == "":
        raise FailpointReached(f"Failpoint {name}. Unset {VARIABLE} to go without.")
    if asked is not None:
        time.sleep(FOR_EVER_S if asked == "block" else float(asked))


def seconds(name: str, ordinary_s: float) -> float:
    """A time limit that a test may set."""
    asked = _asked(name)
    return float(asked) if asked else ordinary_s


def _asked(name: str) -> str | None:
    """What stands behind the name, None where the name does not stand."""
    for one in os.environ.get(VARIABLE, "").split(","):
        given, _, what = one.partition(":")
        if given == name:
            return what
    return None
