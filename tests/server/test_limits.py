"""Clients that take too long or too much: each has a bound, and none holds up the others.

Hypercorn with our connections and our gate, and times that a test can wait for; last a real server.
"""

import asyncio
import resource
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import hypercorn.asyncio
import hypercorn.asyncio.run
import hypercorn.config
import pytest
from hypercorn.typing import Framework
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from agent_memory.keys import Keys
from agent_memory.server import gate
from agent_memory.server.access import Names
from agent_memory.server.connections import OTHER_FILES, Connections
from agent_memory.server.gate import Gate
from agent_memory.server.listener import listen
from agent_memory.server.upload import Place
from tests.process import Server, post_head

HEAD_S = 0.4
MOST = 8
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = post_head(2).replace(b"/v1/chat/completions", b"/slow") + b"{}"
NUM_SILENT = 2000

Client = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Site:
    """`GET /` is answered at once, `POST /slow` when `done` is set.  `full`: all are busy."""

    def __init__(self, tmp_path: Path, head_s: float) -> None:
        self.connections = Connections(30, MOST, head_s)
        self.begun, self.full, self.done = asyncio.Event(), asyncio.Event(), asyncio.Event()
        routes = [Route("/", self._fast), Route("/slow", self._slow, methods=["POST"])]
        place = Place(tmp_path, lambda num_bytes: True)
        self._gate = Gate(
            *(Starlette(routes=routes), Names(None), Keys(), place),
            draining=lambda: False,
            own_state=lambda tenant: {},
        )
        self._clients: list[Client] = []
        self.port = 0

    async def _fast(self, request: Request) -> Response:
        return PlainTextResponse("ok")

    async def _slow(self, request: Request) -> Response:
        self.begun.set()
        if self.connections.num_busy == MOST:
            self.full.set()
        await self.done.wait()
        return PlainTextResponse("ok")

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["Site"]:
        used = vars(hypercorn.asyncio.run)
        before, end = used["TCPServer"], asyncio.Event()
        self.connections.track()
        listener = listen("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        settings = hypercorn.config.Config()
        settings.bind = [f"fd://{listener.detach()}"]
        app = cast(Framework, self._gate)
        serving = asyncio.create_task(
            hypercorn.asyncio.serve(app, settings, shutdown_trigger=end.wait)
        )
        try:
            yield self
            self.connections.check()
        finally:
            self.done.set()
            self.connections.abort()
            for _, writer in self._clients:
                writer.close()
            end.set()
            await serving
            used["TCPServer"] = before

    async def connect(self, data: bytes = b"") -> Client:
        client = await asyncio.open_connection("127.0.0.1", self.port)
        self._clients.append(client)
        client[1].write(data)
        return client

    async def ask(self, client: Client | None = None) -> int:
        reader, writer = client or await self.connect()
        writer.write(GET)
        return await status(reader)


async def status(reader: asyncio.StreamReader) -> int:
    """Of the next answer, read with what it says."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
    await reader.readexactly(length)
    return int(head.split()[1])


async def is_closed(client: Client) -> bool:
    """By the server, soon, and with nothing said."""
    try:
        async with asyncio.timeout(5):
            return await client[0].read() == b""
    except ConnectionResetError:
        return True


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with Site(tmp_path, HEAD_S).serving() as site:
        yield site


@pytest.fixture
async def patient(tmp_path: Path) -> AsyncIterator[Site]:
    async with Site(tmp_path, 60).serving() as site:
        yield site


@pytest.mark.requirement("F-13")
async def test_a_slow_head_is_cut(site: Site) -> None:
    """However steadily it comes."""
    client, other = await site.connect(), await site.connect()
    loop = asyncio.get_running_loop()
    began = loop.time()
    closing = asyncio.create_task(is_closed(client))
    while not closing.done():
        client[1].write(b"x")
        assert await site.ask(other) == 200
        await asyncio.sleep(HEAD_S / 10)
    assert closing.result() and HEAD_S <= loop.time() - began < 4
    assert site.connections.num_closed == {"slow_head": 1, "made_room": 0, "too_many": 0}


@pytest.mark.requirement("F-13")
async def test_a_later_head_is_cut_as_well_and_a_pause_before_it_is_not(site: Site) -> None:
    client = await site.connect()
    assert await site.ask(client) == 200
    await asyncio.sleep(2 * HEAD_S)
    assert await site.ask(client) == 200
    client[1].write(GET[:10])
    assert await is_closed(client)
    assert site.connections.num_closed == {"slow_head": 1, "made_room": 0, "too_many": 0}


@pytest.mark.requirement("F-13")
async def test_who_says_nothing_at_all_is_cut(site: Site) -> None:
    assert await is_closed(await site.connect())


@pytest.mark.requirement("F-13")
async def test_a_slow_body_is_answered_and_closed(
    patient: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "BODY_S", HEAD_S)
    clients = [await patient.connect(POST[:-1]) for _ in range(MOST - 1)]
    assert await patient.ask() == 200
    for reader, _ in clients:
        assert await status(reader) == 408
        assert await reader.read() == b""


@pytest.mark.requirement("F-15")
async def test_room_is_made_by_who_waits_longest(patient: Site) -> None:
    busy = await patient.connect(POST)
    await patient.begun.wait()
    silent = [await patient.connect() for _ in range(MOST)]
    assert await is_closed(silent[0])
    assert not silent[1][0].at_eof()
    assert await patient.ask() == 200
    patient.done.set()
    assert await status(busy[0]) == 200
    assert patient.connections.num_closed["made_room"] == 2


@pytest.mark.requirement("F-15")
async def test_when_all_are_busy_one_more_is_told_so(patient: Site) -> None:
    busy = [await patient.connect(POST) for _ in range(MOST)]
    await patient.full.wait()
    assert patient.connections.num_busy == MOST
    reader, _ = await patient.connect()
    said = await reader.read()
    assert said.startswith(b"HTTP/1.1 503 ") and b"Retry-After: " in said
    assert b'"code": "too_many_connections"' in said
    patient.done.set()
    assert [await status(reader) for reader, _ in busy] == [200] * MOST
    assert await patient.ask() == 200


@pytest.fixture
def many_files() -> Iterator[None]:
    """As many as the test itself needs."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2 * NUM_SILENT, before[1]), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.requirement("F-15")
@pytest.mark.usefixtures("many_files")
def test_connections_that_say_nothing_shut_out_nobody(server: Server) -> None:
    silent: list[socket.socket] = []
    try:
        for n in range(NUM_SILENT):
            silent.append(server.connect())
            if n % 500 == 499:
                assert server.get("/healthz").status_code == 200
                assert server.ask("Hello", max_tokens=1).status_code == 200
        assert server.metric("connections") <= 512
        assert server.metric('connections_closed{reason="made_room"}') >= NUM_SILENT - 512
    finally:
        for client in silent:
            client.close()
    server.wait_until(lambda: server.metric("connections") == 1)
    assert server.ask("Hello").status_code == 200


@pytest.mark.requirement("F-15")
@pytest.mark.parametrize(("files", "fits"), [(OTHER_FILES + 40, 40), (OTHER_FILES, 8), (4000, 512)])
def test_there_are_no_more_than_open_files_allow(files: int, fits: int) -> None:
    program = (
        "import resource; from agent_memory.server.connections import most_that_fit;"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (60, {files}));"
        "print(most_that_fit(512), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True
    )
    most, soft = done.stdout.split()[-2:]
    assert int(most) == fits and int(soft) == min(files, 512 + OTHER_FILES)
    assert ("fewer_connections" in done.stdout) == (fits < 512)
