"""F8, F9: clients that leave at any moment, and clients that send anything."""

import json
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from random import Random

import httpx
import pytest

from tests.process import CHAT, ENDLESS, Server, chat, raw_post
from tests.suites import NewSuite, sized

SEED = 80
LONGEST_S = 0.2
PATIENCE_S = 0.5
ALLOWED = {200, 400, 404, 405, 408, 413, 415, 421, 431, 501, 505}
"""What whoever sends anything may hear; never a 5xx that says it is our fault."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server")) as server:
        yield server.wait_ready()


def num_open(server: Server) -> int:
    """Files and sockets of the server's process."""
    return len(os.listdir(f"/proc/{server.pid}/fd")) if Path("/proc/self/fd").exists() else 0


@pytest.mark.requirement("F-08")
@sized(short=10, full=1000)
def test_clients_that_leave(num_cases: int, server: Server, suite: NewSuite) -> None:
    """With a goodbye or a reset, in a stream or not; then nothing of them is left."""
    rng = Random(SEED)
    server.ask("Hello!")
    before = num_open(server)
    with suite("F8 clients that leave", num_cases, SEED) as cases:
        for n in range(num_cases):
            stream, reset, wait_s = rng.random() < 0.5, rng.random() < 0.5, rng.random() * LONGEST_S
            with cases.case((n, stream, reset, wait_s)), server.connect() as client:
                client.sendall(raw_post(chat(f"{n} {ENDLESS}", stream=stream, user=f"u{n % 20}")))
                time.sleep(wait_s)
                if reset:
                    off = struct.pack("ii", 1, 0)
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, off)
        server.wait_until(lambda: server.metric("running") == server.metric("waiting") == 0, 5)
        server.wait_until(lambda: server.metric("connections") == 1, 5)
        server.wait_until(lambda: num_open(server) <= before + 3, 10)
    assert server.ask("Hello!").status_code == 200
    assert not server.events("check_failed") and "Traceback" not in server.log()


ODD = [b"\x00", b"\xff", b"\r\n", b"{", b"[[[[", b'"', b"1e999", b"-0", b"null"]
KINDS: list[object]
KINDS = [None, True, -1, 1e308, 10**30, "", "\u0000", [], [[]], {}, {"a": None}, "x" * 10_000]


def flipped(raw: bytearray, rng: Random) -> None:
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)


def cut(raw: bytearray, rng: Random) -> None:
    at = rng.randrange(len(raw))
    del raw[at : at + rng.randrange(1, 20)]


def doubled(raw: bytearray, rng: Random) -> None:
    at = rng.randrange(len(raw))
    raw[at:at] = raw[at : at + rng.randrange(1, 40)]


def odd(raw: bytearray, rng: Random) -> None:
    at = rng.randrange(len(raw))
    raw[at:at] = rng.choice(ODD)


def odd_value(raw: bytearray, rng: Random) -> None:
    """A field of the body has a value of another kind."""
    value = json.loads(bytes(raw))
    place = rng.choice([value, value["messages"][0]])
    place[rng.choice(list(place))] = rng.choice(KINDS)
    raw[:] = json.dumps(value).encode()


MORE = {"max_tokens": 1, "stream": False, "stop": ["x"], "seed": 1, "tools": [], "user": "fuzz"}
CHANGES: list[Callable[[bytearray, Random], None]] = [flipped, cut, doubled, odd]


def answered(server: Server, raw: bytes) -> int:
    """The status; 0 if the server hung up, or waited for more until we did."""
    with server.connect() as client:
        client.sendall(raw)
        if not select.select([client], [], [], PATIENCE_S)[0]:
            client.shutdown(socket.SHUT_WR)
        answer = HTTPResponse(client)
        try:
            answer.begin()
        except (HTTPException, OSError):
            return 0
        return answer.status


@pytest.mark.requirement("F-09")
@sized(short=60, full=8000)
def test_odd_bodies(num_cases: int, server: Server, suite: NewSuite) -> None:
    rng, log = Random(SEED), len(server.log())
    json_is_sent = {"Content-Type": "application/json"}
    with (
        suite("F9 odd bodies", num_cases, SEED) as cases,
        httpx.Client(base_url=server.url, headers=json_is_sent, timeout=60) as client,
    ):
        for n in range(num_cases):
            raw = bytearray(json.dumps(chat("Hi", **MORE)).encode())
            change = rng.choice([odd_value, *CHANGES])
            change(raw, rng)
            with cases.case((n, bytes(raw))):
                assert client.post(CHAT, content=bytes(raw)).status_code in (200, 400, 404)
    assert "Traceback" not in server.log()[log:]


@pytest.mark.requirement("F-09")
@sized(short=60, full=4000)
def test_odd_requests(num_cases: int, server: Server, suite: NewSuite) -> None:
    rng, log = Random(SEED), len(server.log())
    good = raw_post(chat("Hi", **MORE))
    with suite("F9 odd requests", num_cases, SEED) as cases:
        for n in range(num_cases):
            raw = bytearray(good)
            rng.choice(CHANGES)(raw, rng)
            with cases.case((n, bytes(raw))):
                status = answered(server, bytes(raw))
                assert status in ALLOWED | {0}, status
    assert server.ask("Hello!").status_code == 200
    assert "Traceback" not in server.log()[log:]
