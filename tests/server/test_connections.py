"""Clients that go, stall, lie or speak something else: the server stays well for the others."""

import socket
import struct
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import h2.connection
import h2.events
import hypercorn.asyncio.run
import pytest
from hypercorn.asyncio.tcp_server import TCPServer

from agent_memory.errors import PortInUse
from agent_memory.server.connections import Connections
from agent_memory.server.gate import MAX_BODY_BYTES, MAX_IGNORED_BYTES
from agent_memory.server.listener import listen
from tests.process import CHAT, ENDLESS, Server, chat, post_head, raw_post, read_until

CHUNKED = "Transfer-Encoding: chunked"
JSON = "Content-Type: application/json"


def read_all(client: socket.socket) -> bytes:
    """Whatever comes until the server closes."""
    pieces = []
    try:
        while piece := client.recv(65536):
            pieces.append(piece)
    except ConnectionResetError:
        pass
    return b"".join(pieces)


def status(answer: bytes) -> int:
    return int(answer.split()[1]) if answer else 0


def is_idle(server: Server) -> bool:
    return server.metric("running") == 0 and server.metric("waiting") == 0


@pytest.mark.requirement("B-25")
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_ends_its_answer(server: Server, stream: bool) -> None:
    name = f"gone-{stream}"
    cancelled = server.metric('requests_total{reason="cancelled"}')
    with server.connect() as client:
        head, body = raw_post(chat(ENDLESS, stream=stream, user=name)).split(b"\r\n\r\n", 1)
        client.sendall(head + b"\r\n\r\n" + body)
        server.wait_until(lambda: server.metric("running") == 1)
        time.sleep(0.3)
    server.wait_until(lambda: is_idle(server), 2)
    assert server.metric('requests_total{reason="cancelled"}') == cancelled + 1
    server.wait_until(lambda: server.get(f"/v1/agents/{name}").status_code == 200)
    kept = server.get(f"/v1/agents/{name}").json()
    prompt = server.ask(ENDLESS, max_tokens=1).json()["usage"]
    assert kept["tokens"] >= prompt["prompt_tokens"]
    assert prompt["prompt_tokens_details"]["cached_tokens"] == prompt["prompt_tokens"] - 1


@pytest.mark.requirement("B-25")
def test_half_a_goodbye_is_a_goodbye(server: Server) -> None:
    with server.connect() as client:
        client.sendall(raw_post(chat(ENDLESS, stream=True)))
        server.wait_until(lambda: server.metric("running") == 1)
        client.shutdown(socket.SHUT_WR)
        server.wait_until(lambda: is_idle(server), 2)


def test_a_reader_that_stalls_does_not_hold_the_others(server: Server) -> None:
    with server.connect_and_stall(max_tokens=200) as client:
        assert server.metric("running") == 1
        assert server.ask("Hello").status_code == 200
        server.wait_until(lambda: is_idle(server))
        assert b"data: [DONE]" in read_until(client, b"data: [DONE]")


@pytest.mark.requirement("F-13")
def test_a_reader_that_stalls_is_cut_in_the_end(tmp_path: Path) -> None:
    with Server(tmp_path, "--send-timeout", "0.5").wait_ready() as server:
        with server.connect_and_stall() as client:
            server.wait_until(lambda: is_idle(server), 5)
            server.wait_until(lambda: server.metric("connections") == 1, 5)
            assert server.metric("connections_cut") == 1
            assert server.metric('requests_total{reason="cancelled"}') == 1
            assert b"[DONE]" not in read_all(client)
        assert server.event("connection_cut")["unsent_bytes"] > 0


@pytest.mark.requirement("F-13")
def test_who_reads_nothing_and_says_goodbye_is_cut_as_well(tmp_path: Path) -> None:
    """However little of what it asked for is left to send."""
    with Server(tmp_path, "--send-timeout", "0.5").wait_ready() as server, ExitStack() as stack:
        clients = [stack.enter_context(server.connect_narrow()) for _ in range(30)]
        for n, client in enumerate(clients):
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * n)
        time.sleep(0.2)
        for client in clients:
            with suppress(OSError):  # it has been cut
                client.shutdown(socket.SHUT_WR)
        server.wait_until(lambda: server.metric("connections") == 1, 10)


@pytest.mark.requirement("F-08")
def test_who_asks_again_before_the_answer_and_goes_leaves_nothing(server: Server) -> None:
    server.wait_until(lambda: server.metric("connections") == 1)
    for _ in range(3):
        with server.connect() as client:
            both = chat(ENDLESS, stream=True), chat("Hello", max_tokens=1)
            client.sendall(b"".join(map(raw_post, both)))
            read_until(client, b"data: ")
            reset = struct.pack("ii", 1, 0)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
    server.wait_until(lambda: server.metric("connections") == 1, 10)


@pytest.mark.slow
def test_a_slow_reader_is_not_cut(tmp_path: Path) -> None:
    """It takes longer than the send timeout for all, but never reads nothing for so long."""
    with Server(tmp_path, "--send-timeout", "0.5").wait_ready() as server:
        with server.connect_and_stall(max_tokens=500) as client:
            data = b""
            while b"data: [DONE]" not in data:
                data += client.recv(4096)
                time.sleep(0.005)
        assert server.metric("connections_cut") == 0


@pytest.mark.requirement("F-14", "S-10")
def test_a_body_too_large(server: Server) -> None:
    with server.connect() as client:
        client.sendall(post_head(MAX_BODY_BYTES + 1) + b" " * (MAX_BODY_BYTES + 1))
        answer = read_until(client, b"}}")
        assert status(answer) == 413 and b"body_too_large" in answer
        client.sendall(raw_post(chat("Hello")))
        assert status(read_until(client, b"}}")) == 200


@pytest.mark.requirement("F-14", "S-10")
def test_a_body_beyond_measure(server: Server) -> None:
    """Twenty that lie at once: each is answered and closed, and nothing of it stays."""
    clients = [server.connect() for _ in range(20)]
    for client in clients:
        client.sendall(post_head(1 << 40))
    for client in clients:
        sent, piece = 0, b" " * (1 << 20)
        try:
            while sent <= 3 * MAX_IGNORED_BYTES:
                sent += client.send(piece)
        except OSError:
            pass
        assert sent <= 3 * MAX_IGNORED_BYTES
        assert status(read_all(client)) in (0, 413)  # 0: the reset overtook the answer
        client.close()
    server.wait_until(lambda: server.metric("connections") == 1, 10)
    assert server.ask("Hello").status_code == 200


@pytest.mark.requirement("F-14")
def test_a_refusal_of_a_body_in_many_pieces_leaves_the_connection_usable(server: Server) -> None:
    """More pieces than Hypercorn's queue holds."""
    with server.connect() as client:
        head = post_head(100_000).replace(b"application/json", b"text/plain")
        client.sendall(head)
        for _ in range(100):
            client.sendall(b" " * 1000)
            time.sleep(0.001)
        assert status(read_until(client, b"}}")) == 415
        client.sendall(raw_post(chat("Hello")))
        assert status(read_until(client, b"}}")) == 200


@pytest.mark.requirement("S-17")
@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.0\r\n\r\n", 421),
        (b"GET /healthz HTTP/1.0\r\nHost: localhost\r\n\r\n", 200),
        (b"nonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00", 400),
    ],
)
def test_odd_requests(server: Server, request_: bytes, expected: int) -> None:
    with server.connect() as client:
        client.sendall(request_)
        client.shutdown(socket.SHUT_WR)
        assert status(read_all(client)) == expected


LONG_HEAD = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Odd: "


@pytest.mark.requirement("S-17")
@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([b"nonsense\r\n\r\n"], 400),
        ([b"GET /healthz HTTP/1.1\r\n\r\n"], 400),
        ([LONG_HEAD, b"x" * (16 << 10), b"\r\n\r\n"], 431),
        ([b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n"], 501),
    ],
)
def test_what_is_no_request_is_answered_without_a_word(
    server: Server, pieces: list[bytes], expected: int
) -> None:
    """And without an id."""
    with server.connect() as client:
        for piece in pieces:
            client.sendall(piece)
            time.sleep(0.1)
        answer = read_all(client).lower()
    assert status(answer) == expected
    assert b"content-length: 0" in answer and b"x-request-id" not in answer


@pytest.mark.requirement("S-17")
def test_a_head_of_16_kib_is_read_however_it_comes(server: Server) -> None:
    with server.connect() as client:
        client.sendall(LONG_HEAD)
        time.sleep(0.1)
        client.sendall(b"x" * ((16 << 10) - len(LONG_HEAD)))
        time.sleep(0.1)
        client.sendall(b"\r\n\r\n")
        assert status(client.recv(65536)) == 200


@pytest.mark.requirement("S-21")
@pytest.mark.parametrize(
    "lengths", [("Content-Length: 9", CHUNKED), (CHUNKED, "Content-Length: 9")]
)
def test_two_lengths_are_refused_and_the_rest_is_no_request(
    server: Server, lengths: tuple[str, str]
) -> None:
    head = "\r\n".join([f"POST {CHAT} HTTP/1.1", "Host: localhost", JSON, *lengths, "", ""])
    with server.connect() as client:
        client.sendall(head.encode() + b"0\r\n\r\nGET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = read_all(client)
    assert status(answer) == 400 and b"two_lengths" in answer
    assert answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.requirement("S-17")
def test_http_2_is_not_spoken(server: Server) -> None:
    speech = h2.connection.H2Connection()
    speech.initiate_connection()
    get = {":method": "GET", ":path": "/healthz", ":scheme": "http", ":authority": "localhost"}
    speech.send_headers(1, list(get.items()), end_stream=True)
    heard: list[h2.events.Event] = []
    with server.connect() as client:
        client.sendall(speech.data_to_send())
        while not any(isinstance(event, h2.events.StreamEnded) for event in heard):
            heard += speech.receive_data(client.recv(65536))
    (answer,) = (event for event in heard if isinstance(event, h2.events.ResponseReceived))
    assert (b":status", b"505") in answer.headers


@pytest.mark.requirement("S-17")
def test_no_web_sockets(server: Server) -> None:
    with server.connect() as client:
        client.sendall(
            b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
            b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        assert status(client.recv(65536)) == 403


@pytest.mark.requirement("L-14")
def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse, match=f"Port {port} of 127.0.0.1 is taken"):
            listen("127.0.0.1", port)


@pytest.mark.requirement("L-12")
def test_connections_are_tracked_by_a_class_that_hypercorn_uses() -> None:
    used = vars(hypercorn.asyncio.run)
    before = used["TCPServer"]
    try:
        Connections(30, 8).track()
        assert used["TCPServer"] is not before and issubclass(used["TCPServer"], TCPServer)
    finally:
        used["TCPServer"] = before


@pytest.mark.requirement("F-14")
def test_a_body_in_chunks_that_is_too_large(server: Server) -> None:
    with server.connect() as client:
        head = post_head(0, "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"")
        client.sendall(head)
        for _ in range(9):
            client.sendall(b"100000\r\n" + b" " * (1 << 20) + b"\r\n")
        client.sendall(b"0\r\n\r\n")
        answer = read_until(client, b"}}")
        assert status(answer) == 413 and b"body_too_large" in answer
        client.sendall(raw_post(chat("Hello")))
        assert status(read_until(client, b"}}")) == 200
