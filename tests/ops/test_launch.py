"""The command `launch` beside a real server, with programs of our own in place of the clients."""

import json
import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from agent_memory.keys import CLIENT_VARIABLE
from agent_memory.ops import launch
from tests.process import Server

ODD = "a b'c$d"


def run(*args: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "agent_memory", "launch", *args]
    environ = {**os.environ, "PATH": f"{path}:/usr/bin:/bin"} if path else None
    return subprocess.run(command, capture_output=True, text=True, timeout=20, env=environ)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A folder with `claude`, `codex` and `opencode`, which tell what they are started with."""
    for name in launch.CLIENTS:
        told = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"
        file = tmp_path / name
        file.write_text(f"#!{sys.executable}\n{told}\n", "utf-8")
        file.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("client", launch.CLIENTS)
def test_what_is_printed_is_what_is_run(server: Server, program: Path, client: str) -> None:
    args = (client, "--url", server.url + "/")
    printed = run(*args, "--", "-p", ODD).stdout
    shell = ["/bin/sh", "-c", printed]
    environ = {**os.environ, "PATH": f"{program}:/usr/bin:/bin"}
    by_hand = json.loads(subprocess.check_output(shell, env=environ, timeout=20))
    execed = json.loads(run(*args, "--exec", "--", "-p", ODD, path=program).stdout)
    told = json.loads(run(*args, "--json", "--", "-p", ODD).stdout)
    assert execed[0] == by_hand[0] == told["command"][1:] and execed[0][-2:] == ["-p", ODD]
    assert not told["key_variables"]
    assert told["variables"].items() <= execed[1].items() & by_hand[1].items()


@pytest.mark.parametrize("client", launch.CLIENTS)
def test_no_key_is_printed(
    server: Server, client: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What programs are told names the variables that want it."""
    key, file = "k" * 20, tmp_path / "key"
    file.write_text(key)
    file.chmod(0o600)
    wanted = "ANTHROPIC_AUTH_TOKEN" if client == "claude" else CLIENT_VARIABLE
    for flags in (("--api-key-file", str(file)), ()):
        if not flags:
            monkeypatch.setenv(CLIENT_VARIABLE, key)
        printed = run(client, "--url", server.url, *flags).stdout
        told = run(client, "--url", server.url, *flags, "--json").stdout
        assert f"export {wanted}=" in printed and key not in printed + told
        assert json.loads(told)["key_variables"] == [wanted]


def test_each_client_is_told_where_and_which(server: Server) -> None:
    claude = launch.claude(server.url, "builtin").variables
    assert claude["ANTHROPIC_BASE_URL"] == server.url and claude["ANTHROPIC_MODEL"] == "builtin"
    patience = [claude["API_TIMEOUT_MS"], claude["CLAUDE_STREAM_IDLE_TIMEOUT_MS"]]
    codex = launch.codex(server.url, 'or"g/m').command
    settings = tomllib.loads("\n".join(codex[2::2]))
    assert settings["model"] == 'or"g/m' and settings["model_provider"] == launch.NAME
    told = settings["model_providers"][launch.NAME]
    assert told["base_url"] == f"{server.url}/v1"
    opencode = launch.opencode(server.url, "org/m").variables["OPENCODE_CONFIG_CONTENT"]
    provider = json.loads(opencode)["provider"][launch.NAME]
    assert provider["options"]["baseURL"] == f"{server.url}/v1" and "org/m" in provider["models"]
    options = provider["options"]
    patience += [told["stream_idle_timeout_ms"], options["headerTimeout"], options["chunkTimeout"]]
    assert {int(wait) for wait in patience} == {launch.PATIENCE_MS}


def test_it_says_what_is_wrong(server: Server, tmp_path: Path) -> None:
    unknown = run("codex", "--url", server.url, "--model", "other")
    assert unknown.returncode == 64 and "only builtin" in unknown.stderr
    absent = run("codex", "--url", server.url, "--exec", path=tmp_path)
    assert absent.returncode == 64 and "no 'codex' on the PATH" in absent.stderr
    nobody = run("codex", "--url", "http://127.0.0.1:9")
    assert nobody.returncode == 69


def test_lines_are_for_a_shell() -> None:
    one = launch.Launch(("x", ODD), {"A": ODD})
    assert [shlex.split(line) for line in one.lines()] == [["export", f"A={ODD}"], ["x", ODD]]
