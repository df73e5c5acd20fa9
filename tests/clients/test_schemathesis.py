"""Thousands of odd requests, made from /openapi.json: no 5xx, and the server is right afterwards.

Needs `schemathesis` on the PATH: `pip install schemathesis`, best in an environment of its own.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.process import Server

SCHEMATHESIS = shutil.which("schemathesis")
LEAST_CASES = 2000
EXAMPLES = 60
"""For each operation, beside those that go to the edges of every field."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(SCHEMATHESIS is None, reason="pip install schemathesis"),
]


def test_odd_requests_harm_nothing(tmp_path: Path) -> None:
    # The model may ramble on for longer than schemathesis waits, so its context is short.
    with Server(tmp_path, "--context-length", "1024") as server:
        server.wait_ready()
        before = server.ask("What is a list?", max_tokens=40).json()["choices"]
        assert SCHEMATHESIS is not None
        command = [SCHEMATHESIS, "run", f"{server.url}/openapi.json", "--seed", "1"]
        command += ["--checks", "not_a_server_error", "--max-examples", str(EXAMPLES)]
        command += ["--suppress-health-check", "all", "--request-timeout", "60", "--workers", "2"]
        environ = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        done = subprocess.run(
            command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=3000
        )
        assert done.returncode == 0, done.stdout[-8000:] + server.log()[-2000:]
        (cases,) = re.findall(r"(\d+) generated", done.stdout)
        assert int(cases) >= LEAST_CASES
        assert not server.events("request_failed") and not server.events("turn_failed")
        assert server.ask("What is a list?", max_tokens=40).json()["choices"] == before
