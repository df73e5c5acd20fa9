"""The command `explain` beside a real server."""

import json
import re
import socket
import subprocess
import sys

from tests.process import Server, chat


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "agent_memory", "explain", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=20)


def test_it_shows_what_the_server_knows(server: Server) -> None:
    for n, text in enumerate(("Remember the orchid well.", "Remember the \x1b[1morchids.")):
        server.post(chat(text, max_tokens=2), **{"X-Agent-ID": "ann", "X-Request-ID": f"shown-{n}"})
        server.wait_until(lambda: "ann" in server.get("/v1/agents").text)
    told = json.loads(run("shown-1", "--url", server.url, "--json").stdout)
    assert told == server.get("/v1/requests/shown-1/explain").json()
    shown = run("shown-1", "--url", server.url + "/")
    assert shown.returncode == 0 and not shown.stderr
    assert shown.stdout.startswith("shown-1 of ann: prompt_changed\n")
    assert "messages[0].content" in shown.stdout and "\x1b" not in shown.stdout
    assert re.search(r"    now +'.*x1b", shown.stdout)
    assert re.search(r"    remembered +'.*orchid", shown.stdout)


def test_it_says_what_it_cannot_show(server: Server) -> None:
    unknown = run("nobody-else", "--url", server.url)
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert "agent-memory: No request 'nobody-else'" in unknown.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = run("x", "--url", f"http://127.0.0.1:{free.getsockname()[1]}")
    assert nobody.returncode == 69 and "agent-memory serve" in nobody.stderr
    assert run("x", "--url", "localhost").returncode == 64
    assert run("x", "--url", "http://").returncode == 69
    assert run().returncode == 64
