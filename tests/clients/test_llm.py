"""The command `llm` against a real server: what it says, and what its log keeps."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.process import Server

pytest.importorskip("llm", reason="needs the group of clients: pip install --group clients")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

FORM = {
    "type": "object",
    "properties": {"sunny": {"type": "boolean"}},
    "required": ["sunny"],
    "additionalProperties": False,
}
SHORT = ["-o", "temperature", "0", "-o", "max_tokens", "40"]


@pytest.fixture(scope="module")
def home(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where it looks for models and keeps its log."""
    folder = tmp_path_factory.mktemp("llm")
    model = {"model_id": "here", "model_name": "builtin", "api_base": f"{server.url}/v1"}
    models = [{**model, "supports_schema": True}]
    (folder / "extra-openai-models.yaml").write_text(json.dumps(models), "utf-8")  # JSON is YAML
    return folder


def llm(home: Path, *args: str) -> str:
    command = [sys.executable, "-m", "llm", *args]
    environ = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    environ["LLM_USER_PATH"] = str(home)
    done = subprocess.run(
        command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def logged(home: Path) -> dict[str, Any]:
    """The last answer, as its log has it."""
    (entry,) = json.loads(llm(home, "logs", "--json", "-n", "1"))
    found: dict[str, Any] = entry
    return found


def test_streamed_and_whole_and_what_was_remembered(home: Path) -> None:
    streamed = llm(home, "-m", "here", "Hello there", *SHORT)
    first = logged(home)
    assert llm(home, "-m", "here", "Hello there", "--no-stream", *SHORT) == streamed
    llm(home, "--continue", "And now?", *SHORT)
    second = logged(home)
    assert first["response"] == streamed.strip() and first["conversation_id"]
    details = json.loads(second["token_details"])
    assert details["prompt_tokens_details"]["cached_tokens"] >= first["input_tokens"]


def test_a_schema(home: Path) -> None:
    asked = ["-m", "here", "Is it sunny?", "--schema", json.dumps(FORM), *SHORT]
    assert isinstance(json.loads(llm(home, *asked))["sunny"], bool)
