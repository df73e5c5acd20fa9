"""The line between the event loop and the engine thread: commands in, events out, nothing else.

Commands are callables, run on the engine thread between two steps.  Events of one turn cross to the
loop together, in one wake-up.  `send` and `call`: any thread.  The rest: engine thread.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import TypeVar

from agent_memory.request import Event

T = TypeVar("T")
Command = Callable[[], object]


class Stream:
    """One request's events on the loop's side.  Unbounded: the engine never waits for a reader; it
    holds at most one event per token of the answer."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def put(self, event: Event) -> None:
        self._events.put_nowait(event)

    async def get(self) -> Event:
        return await self._events.get()


class Mailbox:
    def __init__(self) -> None:
        self._commands: SimpleQueue[Command] = SimpleQueue()
        self._outbox: list[tuple[Stream, Event]] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def connect(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def send(self, command: Command) -> None:
        self._commands.put(command)

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run on the engine thread; the future has its result or what it raised."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self.send(run)
        return future

    def take(self, *, wait: bool) -> Command | None:
        """The next command; with `wait` sleeps until there is one."""
        try:
            return self._commands.get(block=wait)
        except Empty:
            return None

    def emit(self, stream: Stream, event: Event) -> None:
        self._outbox.append((stream, event))

    def flush(self) -> None:
        if not self._outbox:
            return
        batch, self._outbox = self._outbox, []
        self.on_loop(lambda: _deliver(batch))

    def on_loop(self, function: Callable[[], object]) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():  # at the very end of the process nobody listens any more
            self._loop.call_soon_threadsafe(function)


def _deliver(batch: list[tuple[Stream, Event]]) -> None:
    for stream, event in batch:
        stream.put(event)
