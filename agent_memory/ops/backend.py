"""Which backend MLX computes with, or what to install so that it has one.

Knows the packages that carry a backend.  Never imports MLX: it has to answer before that can fail.
Main thread, at start.
"""

import ctypes
import importlib.metadata
import importlib.util
import sys
from typing import Literal

from agent_memory.errors import ConfigError

Backend = Literal["metal", "cpu", "cuda"]
PACKAGES: dict[str, Backend] = {"mlx-cpu": "cpu", "mlx-cuda-12": "cuda", "mlx-cuda-13": "cuda"}
_INSTALL = (
    "Install exactly one, never both: pip install 'agent-memory[cpu]', or with an NVIDIA GPU "
    "and its driver pip install 'agent-memory[cuda]'."
)


def find() -> Backend:
    """The backend, or ConfigError.  On macOS mlx brings its own.

    On Linux the backend packages all bring the same file, mlx/lib/libmlx.so: without any of them
    mlx cannot be loaded, and of two the one installed last wins until either is removed.
    """
    if sys.platform != "linux":
        return "metal"
    packages = [package for package in PACKAGES if _installed(package)]
    if len(packages) > 1:
        raise ConfigError(
            f"{' and '.join(packages)} are both installed and overwrite each other. "
            f"Remove them: pip uninstall {' '.join(packages)}. {_INSTALL}"
        )
    if problem := _loading_problem():
        raise ConfigError(f"MLX has no backend that works here ({problem}). {_INSTALL}")
    return PACKAGES[packages[0]] if packages else "cpu"  # none: mlx was built from source


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _loading_problem() -> str | None:
    """What the dynamic linker says against MLX's library: a missing backend, GPU driver, …"""
    spec = importlib.util.find_spec("mlx") and importlib.util.find_spec("mlx.core")
    if not spec or not spec.origin:
        return "mlx is not installed"
    try:
        ctypes.CDLL(spec.origin)
    except OSError as error:
        return str(error)
    return None
