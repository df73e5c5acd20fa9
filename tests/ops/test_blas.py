"""OpenBLAS in front of this very command: once, however it was typed, and only if wanted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent_memory.ops import blas
from agent_memory.store.state_dir import StateDir
from tests.source import ROOT

needs_openblas = pytest.mark.skipif(
    sys.platform != "linux" or blas.find() is None, reason="no OpenBLAS on this machine"
)

# Preloads, then tells what it is: its arguments, what is mapped, and the variables.
TELL = """
import os, sys
from agent_memory.ops import blas
blas.preload(os.environ)
mapped = any("openblas" in line for line in open("/proc/self/maps"))
print(sys.argv[1:], mapped, os.environ.get("LD_PRELOAD", "-"))
"""


def tell(*command: str, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in (blas.GUARD, "LD_PRELOAD")}
    env = kept | {"PYTHONPATH": str(ROOT)} | environ
    return subprocess.run(
        [sys.executable, *command], env=env, capture_output=True, text=True, timeout=20
    )


@needs_openblas
def test_a_script_and_a_module_start_again_with_their_arguments(tmp_path: Path) -> None:
    script = tmp_path / "tell.py"
    script.write_text(TELL)
    for command in ((str(script),), ("-m", "tell")):
        done = tell(*command, "a b", "--c", PYTHONPATH=f"{ROOT}:{tmp_path}")
        assert done.stdout == f"['a b', '--c'] True {blas.find()}\n"
        assert done.stderr == f"agent-memory: starting again with {blas.find()}\n"


@needs_openblas
def test_what_was_preloaded_stays() -> None:
    done = tell("-c", TELL, LD_PRELOAD="libm.so.6")
    assert done.stdout == f"[] True {blas.find()}:libm.so.6\n"


@needs_openblas
def test_not_when_it_is_there_already() -> None:
    done = tell("-c", TELL, LD_PRELOAD=str(blas.find()))
    assert (done.stdout, done.stderr) == (f"[] True {blas.find()}\n", "")


@needs_openblas
def test_never_a_third_start() -> None:
    done = tell("-c", TELL, **{blas.GUARD: "1"})
    assert (done.stdout, done.stderr) == ("[] False -\n", "")


@needs_openblas
def test_serve_starts_again_unless_told_not_to(tmp_path: Path) -> None:
    held = StateDir.open(tmp_path)  # so that serve ends right after the preload
    serve = ("-m", "agent_memory", "serve", "--state-dir", str(tmp_path))
    try:
        with_it, without = tell(*serve), tell(*serve, "--no-preload")
    finally:
        held.close()
    assert "starting again with" in with_it.stderr and with_it.returncode == 75
    assert "starting again with" not in without.stderr and without.returncode == 75
