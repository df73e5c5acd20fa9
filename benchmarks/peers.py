"""`mlx_lm.server` as a child process, on the same model and with the same BLAS as ours.

The built-in model is bfloat16 on disk and float32 when we serve it on a CPU; `float32_copy` is for
both to compute the same.  Main thread.
"""

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import mlx.core as mx

from agent_memory import builtin

START_S = 120.0


def float32_copy(folder: Path) -> Path:
    shutil.copytree(builtin.PATH, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    mx.save_safetensors(
        str(folder / "model.safetensors"),
        {name: array.astype(mx.float32) for name, array in weights.items()},
        {"format": "mlx"},
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    return folder


class MlxLmServer:
    """Use it in `with`."""

    def __init__(self, model: Path, step_tokens: int, log_file: Path) -> None:
        self.port = _free_port()
        command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--prefill-step-size", str(step_tokens), "--temp", "0"]
        with log_file.open("wb") as log:
            self._child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + START_S
        while not self._answers():
            if self._child.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"mlx_lm.server did not start:\n{log_file.read_text()}")
            time.sleep(0.1)

    @property
    def pid(self) -> int:
        return self._child.pid

    def _answers(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/health").is_success
        except httpx.TransportError:
            return False

    def __enter__(self) -> "MlxLmServer":
        return self

    def __exit__(self, *_exception: object) -> None:
        self._child.terminate()
        self._child.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
