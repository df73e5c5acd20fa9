"""Requests that find no place: they wait, are told when to come back, or are sent away."""

import json
import socket
import time
from pathlib import Path

import pytest

from tests.conftest import ordinary_text
from tests.process import ENDLESS, Server, chat, raw_post, read_until

LONG = 6_000
"""Characters: some 2,000 tokens."""
ROOM_FOR_TWO = ("--memory-bytes", "78M", "--pool-bytes", "8M", "--kv-bits", "none")


def ask_long(server: Server, n: int, **fields: object) -> socket.socket:
    """A client that has asked something long that begins like no other."""
    text = ordinary_text()[n * LONG : (n + 1) * LONG]
    client = server.connect()
    client.sendall(raw_post(chat(text, max_tokens=512, **fields)))
    return client


def head_and_error(client: socket.socket) -> tuple[bytes, dict[str, str]]:
    head, _, body = read_until(client, b"}}").partition(b"\r\n\r\n")
    error: dict[str, str] = json.loads(body)["error"]
    return head, error


@pytest.mark.requirement("B-01", "L-22")
def test_a_full_queue_says_so_and_when_to_come_back(tmp_path: Path) -> None:
    with Server(tmp_path, "--max-requests", "2").wait_ready() as server:
        assert server.ask("Hello").status_code == 200
        clients = [server.connect() for _ in range(2)]
        for n, client in enumerate(clients):
            client.sendall(raw_post(chat(ENDLESS, stream=True, user=f"u{n}")))
        server.wait_until(lambda: server.metric("running") == 2)
        refused = server.ask("Hello")
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "queue_full"
        assert 1 <= int(refused.headers["Retry-After"]) <= 60
        assert server.get("/readyz").json()["status"] == "queue_full"
        clients[0].close()
        server.wait_until(lambda: server.get("/readyz").status_code == 200)
        assert server.ask("Hello").status_code == 200
        clients[1].close()


@pytest.mark.requirement("F-21")
def test_what_can_never_fit_is_refused_with_the_numbers(tmp_path: Path) -> None:
    flags = ("--memory-bytes", "64M", "--pool-bytes", "64M", "--kv-bits", "none")
    with Server(tmp_path, *flags).wait_ready() as server:
        most = int(server.event("model_ready")["most_tokens"])
        refused = server.ask(ordinary_text()[: 4 * most])
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "memory_exceeded"
        assert f"enough for {most}," in refused.json()["error"]["message"]
        assert server.ask("Hello").status_code == 200


def test_who_waits_when_the_server_ends_is_sent_away_at_once(tmp_path: Path) -> None:
    with Server(tmp_path, *ROOM_FOR_TWO, "--drain-timeout", "3").wait_ready() as server:
        running = [ask_long(server, n, stream=True) for n in range(2)]
        server.wait_until(lambda: server.metric("running") == 2)
        waiting = [ask_long(server, 2 + n, stream=n == 0) for n in range(2)]
        server.wait_until(lambda: server.metric("waiting") == 2)
        since = server.signal()
        for client in waiting:
            head, error = head_and_error(client)
            assert b" 503 " in head and b"retry-after" in head.lower()
            assert error["code"] == "draining"
            client.close()
        assert time.monotonic() - since < 3
        for client in running:
            assert b"data: [DONE]" in read_until(client, b"data: [DONE]")
            client.close()
        assert server.wait(20) == 0
        drain = server.event("server_shutdown_complete")["stages"]["drain"]
        assert drain["turned_away"] == 2 and drain["finished"] + drain["ended"] == 2


@pytest.mark.requirement("L-06")
@pytest.mark.slow
def test_who_waits_hears_that_the_server_is_there(tmp_path: Path) -> None:
    with Server(tmp_path, *ROOM_FOR_TWO, "--step-tokens", "1").wait_ready() as server:
        clients = [ask_long(server, n, stream=True) for n in range(5)]
        server.wait_until(lambda: server.metric("waiting") >= 1)
        for client in clients:
            assert b": keep-alive" in read_until(client, b": keep-alive")
        for client in clients:
            client.close()
