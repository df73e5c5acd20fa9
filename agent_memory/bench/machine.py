"""On what and with what a benchmark ran: a figure means nothing without it.  Main thread."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from agent_memory import __version__
from agent_memory.ops import backend, blas
from agent_memory.ops.machine import Machine
from agent_memory.processes import output

PACKAGES = ("mlx", "mlx-lm", "numpy", "hypercorn", "starlette", "safetensors")


def describe(disk: Path) -> dict[str, Any]:
    """`disk`: a folder where the servers keep what they remember."""
    machine = Machine()
    memory = machine.memory
    kind = backend.find()
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "chip": machine.chip,
        "cores": os.cpu_count(),
        "memory_bytes": memory.total if memory else None,
        "disk": machine.kind_of_disk(disk),
        "backend": kind,
        "blas": _blas() if kind == "cpu" else None,
        "python": platform.python_version(),
        "versions": {
            "agent-memory": __version__,
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "commit": commit(),
    }


def commit() -> str | None:
    """Of the checkout that this code is in, with a + if it was changed since."""
    here = str(Path(__file__).parent)
    name = output("git", "-C", here, "rev-parse", "--short=12", "HEAD").strip()
    changed = output("git", "-C", here, "status", "--porcelain", "--untracked-files=no").strip()
    return f"{name}{'+' if changed else ''}" if name else None


def _blas() -> str:
    loaded = os.environ.get("LD_PRELOAD", "")
    library = blas.find()
    return "OpenBLAS" if library is not None and str(library) in loaded else "MLX's own"
