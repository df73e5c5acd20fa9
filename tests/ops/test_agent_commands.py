"""The command `agents` against a real server."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from agent_memory.errors import NoServer, UsageError
from agent_memory.ops.agent_client import AgentClient
from tests.process import Server

COLUMNS = "200"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Server(tmp_path_factory.mktemp("server")) as server:
        server.wait_ready()
        used = server.ask("Hello!", agent="ann").json()["usage"]["total_tokens"]
        server.wait_until(lambda: server.get("/v1/agents/ann").is_success)
        assert used
        yield server


def agents(server: Server | None, *args: str) -> subprocess.CompletedProcess[str]:
    verb, *others = args
    url = ["--url", server.url] if server else []
    kept = {k: v for k, v in os.environ.items() if not k.startswith("AGENT_MEMORY_")}
    return subprocess.run(
        [sys.executable, "-m", "agent_memory", "agents", verb, *url, *others],
        env=kept | {"COLUMNS": COLUMNS},
        capture_output=True,
        text=True,
        timeout=30,
    )


def told(server: Server, verb: str, *args: str) -> Any:
    done = agents(server, verb, "--json", *args)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_people_see_tables(server: Server) -> None:
    listed = agents(server, "ls").stdout
    assert "agent" in listed and "ann" in listed and "just now" in listed
    shown = agents(server, "show", "ann", "--text").stdout
    assert "turn 1: tokens 0 to" in shown and "Hello!" in shown


def test_programs_get_json(server: Server) -> None:
    assert "ann" in [entry["id"] for entry in told(server, "ls")]
    assert told(server, "show", "ann")["heads"][0]["turns"][0]["start"] == 0


def test_an_agent_through_all_verbs(server: Server, tmp_path: Path) -> None:
    forked = told(server, "fork", "ann", "ben")
    assert forked["id"] == "ben" and forked["tokens"] > 5
    assert told(server, "rewind", "ben", "--tokens", "5")["tokens"] == 5
    assert told(server, "pin", "ben")["pinned"] and not told(server, "unpin", "ben")["pinned"]
    assert told(server, "warm", "ben")["tiers"]["memory"] == 5
    file = tmp_path / "ben.tar"
    exported = told(server, "export", "ben", "-o", str(file))
    assert exported["bytes"] == file.stat().st_size and file.stat().st_mode & 0o777 == 0o600
    assert told(server, "rm", "ben") == {"id": "ben", "removed": True}
    assert told(server, "import", str(file))["tokens"] == 5
    again = agents(server, "import", str(file))
    assert again.returncode == 1 and "already" in again.stderr
    assert agents(server, "import", str(file), "--name", "eve").stdout == (
        "'eve' has 5 tokens in mind.\n"
    )
    assert agents(server, "rm", "eve").returncode == agents(server, "rm", "ben").returncode == 0


def test_a_name_may_begin_like_a_flag(server: Server) -> None:
    """As help says."""
    assert told(server, "fork", "--", "ann", "--odd")["id"] == "--odd"
    assert told(server, "rewind", "--tokens", "5", "--", "--odd")["tokens"] == 5
    assert told(server, "rm", "--", "--odd")["removed"]
    assert "comes after --" in agents(None, "fork", "--help").stdout
    more = agents(None, "ls", "--", "ann")
    assert more.returncode == 64 and "ann" in more.stderr


@pytest.mark.parametrize(
    ("target", "said"),
    [("", "is a folder"), ("..", "is a folder"), ("x" * 300, "cannot be written")],
)
def test_an_export_is_a_file(server: Server, target: str, said: str) -> None:
    refused = agents(server, "export", "ann", "-o", target, "--force")
    assert refused.returncode == 64 and said in refused.stderr
    assert "Traceback" not in refused.stderr


def test_an_export_replaces_nothing_unless_told_to(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "there"
    file.write_text("mine")
    refused = agents(server, "export", "ann", "-o", str(file))
    assert refused.returncode == 64 and "--force" in refused.stderr
    assert file.read_text() == "mine"
    assert agents(server, "export", "nobody", "-o", str(file), "--force").returncode == 1
    assert file.read_text() == "mine" and list(tmp_path.iterdir()) == [file]
    assert agents(server, "export", "ann", "-o", str(file), "--force").returncode == 0
    assert file.stat().st_size > 1000


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("show", "nobody"), 1, "'nobody'"),
        (("rewind", "ann", "--tokens", "99999"), 1, "cannot be rewound"),
        (("rewind", "ann"), 64, "--tokens"),
        (("import", "/no/such/file"), 64, "/no/such/file"),
        (("fly",), 64, "'fly'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_told(
    server: Server, args: tuple[str, ...], code: int, said: str
) -> None:
    done = agents(server, *args)
    assert done.returncode == code and said in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout


def test_no_server_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    done = agents(None, "ls", "--url", f"http://127.0.0.1:{port}")
    assert done.returncode == 69 and "agent-memory serve" in done.stderr
    assert agents(None, "ls", "--url", "127.0.0.1").returncode == 64


def test_another_programs_server_is_told_as_such() -> None:
    other = httpx.MockTransport(lambda request: httpx.Response(200, text="<html>"))
    with AgentClient("http://127.0.0.1:1") as client:
        client._http = httpx.Client(base_url="http://127.0.0.1:1", transport=other)
        with pytest.raises(NoServer, match="none of our servers"):
            client.agents()
    with pytest.raises(UsageError, match="--url"):
        AgentClient("http://127.0.0.1:x")
