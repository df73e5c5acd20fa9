"""Every open connection's transport, in reach.

Hypercorn waits for ever for a client that does not read; only its transport can end that.  This is
the one place that knows Hypercorn from inside: it puts a subclass of its connection class in place.
A client that is sent something and reads nothing of it for `send_timeout_s` is cut off; then its
request ends like that of any client that goes.  So is one that takes too long to ask.  Event loop.
"""

import asyncio
import resource
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import hypercorn.asyncio.run
import structlog
from hypercorn.asyncio.tcp_server import MAX_RECV, TCPServer
from hypercorn.events import Closed, Event, RawData, Updated

from agent_memory.server.listener import BACKLOG

HEAD_S = 20.0
"""From the first byte of a request's head, or from the connection's beginning, to its last."""

FEWEST = 8
OTHER_FILES = BACKLOG + 96
"""Files, pipes, and what is accepted before it is looked at."""

log = structlog.get_logger(__name__)


TOO_MANY = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 5\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n%s"
)
SAID = (
    b'{"error": {"message": "All connections of this server are in use. Try again in a moment, or '
    b'raise --max-connections.", "type": "server_error", "param": null, '
    b'"code": "too_many_connections"}}'
)


class Connections:
    """`most` at once.  One is busy from a whole head to the end of its answer, else it waits.

    For one more than `most` the one that waits longest is closed, so that whoever opens many and
    asks nothing shuts out nobody.  When all are busy, the new one is told so.
    """

    def __init__(self, send_timeout_s: float, most: int, head_s: float = HEAD_S) -> None:
        self.num_cut = 0
        self.num_closed = dict.fromkeys(("slow_head", "made_room", "too_many"), 0)
        self._send_timeout_s = send_timeout_s
        self._most = most
        self._head_s = head_s
        self._busy: set[asyncio.WriteTransport] = set()
        self._waiting: dict[asyncio.WriteTransport, asyncio.TimerHandle | None] = {}
        """The longest first; with the end of its patience, from the first byte of a head on."""

    def __len__(self) -> int:
        return len(self._busy) + len(self._waiting)

    def check(self) -> None:
        assert len(self) <= self._most
        assert not self._busy & self._waiting.keys()

    @property
    def num_busy(self) -> int:
        return len(self._busy)

    @property
    def num_stalled(self) -> int:
        """Connections with more to send than their client lets out: above the high-water mark."""
        return sum(_above_high_water(transport) for transport in self._all())

    def _all(self) -> list[asyncio.WriteTransport]:
        return [*self._busy, *self._waiting]

    def enter(self, transport: asyncio.WriteTransport) -> bool:
        """Whether there is a place for it."""
        if len(self) >= self._most and not self._make_room():
            self.num_closed["too_many"] += 1
            return False
        self._waiting[transport] = self._patience(transport)
        self.check()
        return True

    def leave(self, transport: asyncio.WriteTransport) -> None:
        self._busy.discard(transport)
        self._stop_waiting(transport)

    def heard(self, transport: asyncio.WriteTransport) -> None:
        """Something came."""
        if transport in self._waiting and self._waiting[transport] is None:
            self._waiting[transport] = self._patience(transport)

    def turn(self, transport: asyncio.WriteTransport, *, busy: bool) -> None:
        """It has a whole head, or its answer has ended.  One that was closed stays so."""
        if busy and transport in self._waiting:
            self._stop_waiting(transport)
            self._busy.add(transport)
        elif not busy and transport in self._busy:
            self._busy.remove(transport)
            self._waiting[transport] = None

    def _patience(self, transport: asyncio.WriteTransport) -> asyncio.TimerHandle:
        loop = asyncio.get_running_loop()
        return loop.call_later(self._head_s, self._close, transport, "slow_head")

    def _stop_waiting(self, transport: asyncio.WriteTransport) -> None:
        if timer := self._waiting.pop(transport, None):
            timer.cancel()

    def _make_room(self) -> bool:
        longest = next(iter(self._waiting), None)
        if longest is not None:
            self._close(longest, "made_room")
        return longest is not None

    def _close(self, transport: asyncio.WriteTransport, why: str) -> None:
        self.num_closed[why] += 1
        self._stop_waiting(transport)
        transport.abort()

    def track(self) -> None:
        """From now on Hypercorn's connections are known here; the last caller's win."""
        own = type("Tracked", (Tracked,), {"connections": self})
        vars(hypercorn.asyncio.run)["TCPServer"] = own

    def watch(self, transport: asyncio.WriteTransport) -> "Watch":
        return Watch(transport, self._send_timeout_s, self._cut)

    def _cut(self, transport: asyncio.WriteTransport) -> None:
        """A client that reads nothing."""
        self.num_cut += 1
        log.warning("connection_cut", unsent_bytes=transport.get_write_buffer_size())
        transport.abort()

    def abort(self) -> int:
        """Cut every connection, whatever is unsent; how many there were."""
        transports = self._all()
        for transport in transports:
            transport.abort()
        return len(transports)


class Tracked(TCPServer):
    connections: Connections

    async def run(self) -> None:
        transport = self.writer.transport
        if not self.connections.enter(transport):
            self.writer.write(TOO_MANY % (len(SAID), SAID))
            await self._close()
            return
        self._gone = False
        self._lost = asyncio.gather(self.writer.wait_closed(), return_exceptions=True)
        try:
            await super().run()
        finally:
            self.connections.leave(transport)

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, Updated):
            if self._gone:
                return  # nobody is waited for
            self.connections.turn(self.writer.transport, busy=not event.idle)
        with self.connections.watch(self.writer.transport):
            await super().protocol_send(event)

    async def _close(self) -> None:
        """What is unsent still goes out, if it is read."""
        with self.connections.watch(self.writer.transport):
            await super()._close()

    async def _read_data(self) -> None:
        """To the client's end.  Hypercorn would then sit out the keep-alive time."""
        try:
            while not self.reader.at_eof():
                data = await self.reader.read(MAX_RECV)
                self.connections.heard(self.writer.transport)
                await self._handle(RawData(data))
        except OSError:
            pass  # it has gone without a goodbye
        self._gone = True
        await self.protocol.handle(Closed())
        await self.idle_task.stop()

    async def _handle(self, data: RawData) -> None:
        """As long as there is a connection.  In Hypercorn a request that came before the last was
        answered waits for that answer's end, though with the connection gone there is none."""
        handling = asyncio.ensure_future(self.protocol.handle(data))
        either: set[asyncio.Future[Any]] = {handling, self._lost}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            over = handling.done() or not handling.cancel()
        if over:
            handling.result()
        else:
            await asyncio.wait({handling})


class Watch:
    """Over one send: cuts its connection if nothing leaves for so long.

    Most sends are over before the first look.
    """

    def __init__(
        self,
        transport: asyncio.WriteTransport,
        timeout_s: float,
        cut: Callable[[asyncio.WriteTransport], object],
    ) -> None:
        self._transport = transport
        self._timeout_s = timeout_s
        self._cut = cut
        self._unsent: int | None = None
        self._timer: asyncio.Handle = asyncio.get_running_loop().call_soon(self._look)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_exception: object) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        unsent = self._transport.get_write_buffer_size()
        if self._unsent is not None and unsent >= self._unsent:
            self._cut(self._transport)
            return
        self._unsent = unsent
        self._timer = asyncio.get_running_loop().call_later(self._timeout_s, self._look)


def _above_high_water(transport: asyncio.WriteTransport) -> bool:
    _, high = transport.get_write_buffer_limits()
    return transport.get_write_buffer_size() > high


def most_that_fit(wanted: int) -> int:
    """Each connection is an open file, of which the system allows a process so many.  Asks it for
    more, and makes do with what it gives."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with suppress(OSError, ValueError):  # macOS has a limit it does not tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    most = max(FEWEST, soft - OTHER_FILES)
    log.warning("fewer_connections", wanted=wanted, most=most, open_files=soft)
    return most
