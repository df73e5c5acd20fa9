"""Named places at which a test makes the program fail.

    AGENT_MEMORY_FAILPOINTS=shutdown.persist            raises there
    AGENT_MEMORY_FAILPOINTS=shutdown.persist:block      never comes back from there

Several are separated by commas.  Read at each call; without the variable nothing happens.  Any
thread.
"""

import os
import time

from agent_memory.errors import AgentMemoryError

VARIABLE = "AGENT_MEMORY_FAILPOINTS"


class FailpointReached(AgentMemoryError):
    pass


def failpoint(name: str) -> None:
    asked = os.environ.get(VARIABLE, "").split(",")
    if name in asked:
        raise FailpointReached(f"Failpoint {name}. Unset {VARIABLE} to go without.")
    if f"{name}:block" in asked:
        time.sleep(1e6)
