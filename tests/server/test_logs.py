"""The log's reader may go, and its disk be full: nothing else ends with it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.process import CHAT, chat


@pytest.mark.requirement("L-27", "L-29")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_whose_log_nobody_reads_any_more(tmp_path: Path, number: signal.Signals) -> None:
    """As of `agent-memory serve 2>&1 | tee log`, where Ctrl-C ends tee first."""
    command = [sys.executable, "-m", "agent_memory", "serve", "--port", "0"]
    command += ["--state-dir", str(tmp_path / "state"), "--log-format", "json"]
    ours = {name: "" for name in os.environ if name.startswith("AGENT_MEMORY_")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, **ours}) as server:
        assert server.stderr is not None
        port = 0
        for line in server.stderr:
            told = json.loads(line) if line.startswith(b"{") else {}
            port = told.get("port", port)
            if told.get("event") == "model_ready":
                break
        server.stderr.close()
        url = f"http://127.0.0.1:{port}{CHAT}"
        for stream in (False, True):
            body = chat("Hello", stream=stream, max_tokens=2)
            assert httpx.post(url, json=body, timeout=60).status_code == 200
        assert httpx.post(url, json={}, timeout=60).status_code == 400
        server.send_signal(number)
        assert server.wait(30) == 0
