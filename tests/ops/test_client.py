"""The client against a real server, and the child process it runs in."""

import os
import socket
from pathlib import Path

import pytest

from agent_memory.errors import ServerFailed
from agent_memory.ops.client import Client
from agent_memory.ops.process import ServerProcess
from tests.process import Server

HELLO = [{"role": "user", "content": "Hello!"}]


def test_an_answer_comes_with_its_figures(server: Server) -> None:
    with Client(server.port) as client:
        answer = client.chat("ada", HELLO, 40)
        again = client.chat("ada", HELLO, 40)
    assert answer.text == again.text == "Hello! How can I help you?"
    assert again.cached_tokens == again.prompt_tokens - 1
    assert 0 < again.first_token_s < 10
    line = server.wait_for("request_done", 5, request_id=again.request_id)
    assert (line["agent"], line["cached_memory"]) == ("ada", again.cached_tokens)


def test_what_the_server_refuses_is_told_in_its_words(server: Server) -> None:
    too_long = [{"role": "user", "content": "word " * 9000}]
    with Client(server.port) as client, pytest.raises(ServerFailed, match=r"400.*context holds"):
        client.chat("ada", too_long, 1)


def test_nobody_listening_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with Client(port) as client, pytest.raises(ServerFailed, match="did not answer"):
        client.chat("ada", HELLO, 1)


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(ServerFailed, match=r"(?s)ended with 64.*--kv-bits"):
        ServerProcess(["--kv-bits", "3"], tmp_path / "log")


def test_a_model_that_cannot_be_loaded_is_told_and_no_server_is_left(tmp_path: Path) -> None:
    flags = ["--model", str(tmp_path), "--state-dir", str(tmp_path / "state")]
    with ServerProcess(flags, tmp_path / "log") as server:
        with pytest.raises(ServerFailed, match="The server failed: "):
            server.wait_loaded()
    assert "server_shutdown_complete" in (tmp_path / "log").read_text()


def test_leaving_the_with_ends_the_server(tmp_path: Path) -> None:
    flags = ["--model", "builtin", "--state-dir", str(tmp_path / "state")]
    with pytest.raises(KeyError), ServerProcess(flags, tmp_path / "log") as server:
        raise KeyError
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)
