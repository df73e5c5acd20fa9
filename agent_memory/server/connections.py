"""Every open connection's transport, in reach.

Hypercorn waits for ever for a client that does not read; only its transport can end that.  This is
the one place that knows Hypercorn from inside: it puts a subclass of its connection class in place.
A client that is sent something and reads nothing of it for `send_timeout_s` is cut off; then its
request ends like that of any client that goes.  Event loop.
"""

import asyncio
from collections.abc import Callable

import hypercorn.asyncio.run
import structlog
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.events import Event

log = structlog.get_logger(__name__)


class Connections:
    def __init__(self, send_timeout_s: float) -> None:
        self.num_cut = 0
        self._send_timeout_s = send_timeout_s
        self._transports: set[asyncio.WriteTransport] = set()

    def __len__(self) -> int:
        return len(self._transports)

    @property
    def num_stalled(self) -> int:
        """Connections with more to send than their client lets out: above the high-water mark."""
        return sum(_above_high_water(transport) for transport in self._transports)

    def track(self) -> None:
        """From now on Hypercorn's connections are known here; the last caller's win."""
        transports, cut, timeout_s = self._transports, self._cut, self._send_timeout_s

        class Tracked(TCPServer):
            async def run(self) -> None:
                transport = self.writer.transport
                transports.add(transport)
                try:
                    await super().run()
                finally:
                    transports.discard(transport)

            async def protocol_send(self, event: Event) -> None:
                watching = Watch(self.writer.transport, timeout_s, cut)
                try:
                    await super().protocol_send(event)
                finally:
                    watching.cancel()

            async def _read_data(self) -> None:
                """To the client's end.  Hypercorn would then sit out the keep-alive time."""
                await super()._read_data()
                await self.idle_task.stop()

        vars(hypercorn.asyncio.run)["TCPServer"] = Tracked

    def _cut(self, transport: asyncio.WriteTransport) -> None:
        """A client that reads nothing."""
        self.num_cut += 1
        log.warning("connection_cut", unsent_bytes=transport.get_write_buffer_size())
        transport.abort()

    def abort(self) -> int:
        """Cut every connection, whatever is unsent; how many there were."""
        transports = list(self._transports)
        for transport in transports:
            transport.abort()
        return len(transports)


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

    def cancel(self) -> None:
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
