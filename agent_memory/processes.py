"""Which process is meant by a number: pids are given out again, and boots end them all.

A process is named by boot, pid and the moment it started, as the system tells it.  Asks /proc where
there is one, else `ps` and `sysctl`.  Light modules only.  Any thread.
"""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

ASK_S = 5.0


@cache
def boot_id() -> str:
    """Other after each boot; "" if the system does not tell."""
    if sys.platform == "darwin":
        return output("sysctl", "-n", "kern.bootsessionuuid").strip()
    return _read("/proc/sys/kernel/random/boot_id").strip()


def start_of(pid: int) -> str:
    """When it started, in words of the system's own; "" if it is not there, or has ended and only
    waits for its parent to notice."""
    if sys.platform == "darwin":
        return start_by_ps(pid)
    # The second field is the program's name in brackets, which may hold anything.
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""


def start_by_ps(pid: int) -> str:
    state, _, start = output("ps", "-o", "stat=,lstart=", "-p", str(pid)).strip().partition(" ")
    return "" if state.startswith("Z") else start.strip()


def command_of(pid: int) -> str:
    return output("ps", "-o", "args=", "-p", str(pid)).strip()


def output(*command: str) -> str:
    """What a program says, "" if it is not there or says nothing in time."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=ASK_S,
            check=False,
            env={**os.environ, "LC_ALL": "C", "TZ": "UTC"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace")


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8", "replace")
    except OSError:
        return ""
