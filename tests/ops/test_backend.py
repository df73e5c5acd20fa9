"""What is said when MLX has nothing to compute with.

Real interpreters on made-up site directories: the MLX that is installed here, with its backend
left out or with the records of two.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from agent_memory.ops import backend
from tests.source import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="macOS brings its own backend")

FIND = "from agent_memory.ops import backend; print(backend.find())"


def find_in(site: Path) -> subprocess.CompletedProcess[str]:
    """`backend.find()` in an interpreter that sees the project and `site` only."""
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(site)!r}]\n{FIND}"
    command = [sys.executable, "-S", "-E", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=20)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """MLX as plain `pip install mlx` leaves it on Linux: the module without its library."""
    spec = importlib.util.find_spec("mlx.core")
    assert spec is not None and spec.origin is not None
    (tmp_path / "mlx").mkdir()
    core = Path(spec.origin)
    (tmp_path / "mlx" / core.name).write_bytes(core.read_bytes())
    return tmp_path


def record(site: Path, package: str) -> None:
    folder = site / f"{package.replace('-', '_')}-0.32.4.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.32.4\n")


def test_this_machine_has_a_backend() -> None:
    assert backend.find() in ("cpu", "cuda")


def test_without_a_backend_it_says_what_to_install(site: Path) -> None:
    done = find_in(site)
    assert "ConfigError: MLX has no backend that works here (libmlx.so: " in done.stderr
    assert "pip install 'agent-memory[cpu]'" in done.stderr
    assert "pip install 'agent-memory[cuda]'" in done.stderr


def test_a_backend_whose_driver_is_missing_counts_as_none(site: Path) -> None:
    record(site, "mlx-cuda-13")
    done = find_in(site)
    assert "ConfigError: MLX has no backend that works here (" in done.stderr


def test_two_backends_are_refused(site: Path) -> None:
    record(site, "mlx-cpu")
    record(site, "mlx-cuda-13")
    done = find_in(site)
    assert "mlx-cpu and mlx-cuda-13 are both installed and overwrite each other" in done.stderr
    assert "pip uninstall mlx-cpu mlx-cuda-13" in done.stderr


def test_without_mlx_at_all(tmp_path: Path) -> None:
    assert "MLX has no backend that works here (mlx is not installed)" in find_in(tmp_path).stderr
