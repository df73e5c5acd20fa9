"""Every open connection's transport, in reach.

Hypercorn waits for ever for a client that does not read; only its transport can end that.  This is
the one place that knows Hypercorn from inside: it puts a subclass of its connection class in place.
Event loop.
"""

import asyncio

import hypercorn.asyncio.run
from hypercorn.asyncio.tcp_server import TCPServer


class Connections:
    def __init__(self) -> None:
        self._transports: set[asyncio.WriteTransport] = set()

    def __len__(self) -> int:
        return len(self._transports)

    @property
    def num_stalled(self) -> int:
        """Connections with more to send than their client lets out: above the high-water mark."""
        return sum(_above_high_water(transport) for transport in self._transports)

    def track(self) -> None:
        """From now on Hypercorn's connections are known here; the last caller's win."""
        transports = self._transports

        class Tracked(TCPServer):
            async def run(self) -> None:
                transport = self.writer.transport
                transports.add(transport)
                try:
                    await super().run()
                finally:
                    transports.discard(transport)

            async def _read_data(self) -> None:
                """To the client's end.  Hypercorn would then sit out the keep-alive time."""
                await super()._read_data()
                await self.idle_task.stop()

        vars(hypercorn.asyncio.run)["TCPServer"] = Tracked

    def abort(self) -> int:
        """Cut every connection, whatever is unsent; how many there were."""
        transports = list(self._transports)
        for transport in transports:
            transport.abort()
        return len(transports)


def _above_high_water(transport: asyncio.WriteTransport) -> bool:
    _, high = transport.get_write_buffer_limits()
    return transport.get_write_buffer_size() > high
