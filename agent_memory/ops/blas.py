"""Puts OpenBLAS in front of the BLAS in MLX's CPU wheel, which is many times slower.

Knows where Linux keeps OpenBLAS and how to start this very command again with it preloaded.
OpenBLAS picks its number of threads itself.  Main thread, before anything else runs.
"""

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

GUARD = "AGENT_MEMORY_PRELOADED"
"""Set for the second start, so that there is never a third."""

_MULTIARCH = f"/usr/lib/{platform.machine()}-linux-gnu"
PLACES = (
    Path(_MULTIARCH, "openblas-pthread/libopenblas.so.0"),
    Path(_MULTIARCH, "libopenblas.so.0"),
    Path("/usr/lib64/libopenblasp.so.0"),
    Path("/usr/lib64/libopenblas.so.0"),
    Path("/usr/lib/libopenblas.so.0"),
)


def find() -> Path | None:
    return next((place for place in PLACES if place.exists()), None)


def hint() -> None:
    """Say how to get OpenBLAS if this is a Linux without it."""
    if sys.platform == "linux" and find() is None:
        sys.stderr.write(
            "agent-memory: OpenBLAS makes models on the CPU several times faster; "
            "on Debian and Ubuntu: apt install libopenblas0-pthread\n"
        )


def preload(environ: Mapping[str, str]) -> None:
    """Start this command again with OpenBLAS in front, once.  Returns if it need not or cannot."""
    preloaded = environ.get("LD_PRELOAD", "")
    if GUARD in environ or "openblas" in preloaded:
        return
    library = find()
    if library is None:
        hint()
        return
    sys.stderr.write(f"agent-memory: starting again with {library}\n")
    sys.stderr.flush()
    front = f"{library}:{preloaded}" if preloaded else str(library)
    again = [sys.executable, *sys.orig_argv[1:]]  # as typed: a script's path, or -m agent_memory
    os.execve(sys.executable, again, {**environ, "LD_PRELOAD": front, GUARD: "1"})
