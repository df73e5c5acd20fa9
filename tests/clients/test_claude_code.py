"""Claude Code against a real server: each of its turns goes on from the one before."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.process import Server

CLAUDE = shutil.which("claude")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(CLAUDE is None, reason="needs npm install -g @anthropic-ai/claude-code"),
]


def say(server: Server, home: Path, text: str, *flags: str) -> dict[str, Any]:
    """One turn, in a process of its own.  Of its tools only two, for the built-in model's context
    is short."""
    home.mkdir(exist_ok=True)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "ANTHROPIC_BASE_URL": server.url,
        "ANTHROPIC_AUTH_TOKEN": "none",
        "ANTHROPIC_MODEL": "builtin",
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": "builtin",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "64",
    }
    short = ["--tools", "Bash,Read", "--system-prompt", "You help.", "--output-format", "json"]
    done = subprocess.run(
        [str(CLAUDE), "-p", text, *short, *flags],
        cwd=home,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr + server.log()
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_each_turn_goes_on_from_the_one_before(tmp_path: Path) -> None:
    session = str(uuid4())
    with Server(tmp_path).wait_ready() as server:
        say(server, tmp_path / "home", "Hello there", "--session-id", session)
        first = server.events("request_done")[-1]
        again = say(server, tmp_path / "home", "Hello there", "--resume", session)
        second = server.events("request_done")[-1]
        assert not again["is_error"] and again["stop_reason"] == "end_turn"
        assert (first["agent"], second["agent"]) == (session, session)
        cached = again["usage"]["cache_read_input_tokens"]
        assert cached == first["prompt_tokens"] + first["completion_tokens"]
