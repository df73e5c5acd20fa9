"""Coding agents against a real server, as `agent-memory launch` starts them: the second turn, in a
process of its own, goes on from the memory of the first.

Their first prompts have 12,000 to 34,000 of the built-in model's tokens: minutes on small machines.
"""

import json
import os
import shutil
import string
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent_memory import builtin
from tests.process import Server

CONTEXT = 65_536
MOST_S = 1500
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * MOST_S)]


@dataclass(frozen=True)
class Talk:
    """What each turn is asked with, and where a client's JSON names its session."""

    package: str
    first: tuple[str, ...]
    again: tuple[str, ...]
    session: str


TALKS = {
    "claude": Talk(
        "@anthropic-ai/claude-code",
        ("-p", "Hello there", "--output-format", "json"),
        ("-p", "And now?", "--continue", "--output-format", "json"),
        "session_id",
    ),
    "codex": Talk(
        "@openai/codex",
        ("exec", "--skip-git-repo-check", "--json", "Hello there"),
        ("exec", "resume", "--last", "--skip-git-repo-check", "--json", "And now?"),
        "thread_id",
    ),
    "opencode": Talk(
        "opencode-ai",
        ("run", "--format", "json", "Hello there"),
        ("run", "--continue", "--format", "json", "And now?"),
        "sessionID",
    ),
}


def make_model(folder: Path) -> Path:
    """The built-in model, but with room for long prompts, of which it makes no sense: it ends an
    answer with its first line or mark of punctuation, for else it might find no end."""
    shutil.copytree(builtin.PATH, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**config, "max_position_embeddings": CONTEXT}), "utf-8")
    vocab = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    marks = {*string.punctuation, "Ċ"}  # a line's end, as tokens spell it
    ends = [number for token, number in vocab.items() if marks & {*token}]
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**settings, "eos_token_id": ends}), "utf-8")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with Server(folder, "--model", str(make_model(folder / "model"))) as server:
        yield server.wait_ready()


def say(server: Server, home: Path, client: str, args: tuple[str, ...]) -> list[dict[str, object]]:
    """One turn: what the client tells of it, line by line."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "64",
    }
    launch = [sys.executable, "-m", "agent_memory", "launch", client, "--url", server.url, "--exec"]
    done = subprocess.run(
        [*launch, "--", *args],
        cwd=home,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=MOST_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr + server.log()
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("client", TALKS)
def test_each_turn_goes_on_from_the_one_before(server: Server, tmp_path: Path, client: str) -> None:
    talk = TALKS[client]
    if shutil.which(client) is None:
        pytest.skip(f"needs npm install -g {talk.package}")
    told = say(server, tmp_path, client, talk.first)
    (session,) = {line[talk.session] for line in told if talk.session in line}
    before = server.events("request_done")
    asked = max(int(line["prompt_tokens"]) for line in before if line["agent"] == session)
    assert not [line for line in before if line["finish"] == "cancelled"]
    say(server, tmp_path, client, talk.again)
    later = server.events("request_done")[len(before) :]
    again = next(line for line in later if int(line["prompt_tokens"]) > asked)
    assert again["agent"] == session
    assert int(again["cached_memory"]) + int(again["cached_disk"]) >= 0.9 * asked
    assert session in [agent["id"] for agent in server.get("/v1/agents").json()["data"]]
