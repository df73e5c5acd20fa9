"""The line between the event loop and the engine thread: commands in, events out, nothing else.

Commands are callables, run on the engine thread between two steps.  Events of one turn cross to the
loop together, in one wake-up.  `send` and `call`: any thread.  `stream` and `give_up`: event loop.
The rest: engine thread.
"""

import asyncio
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from agent_memory.errors import RequestError
from agent_memory.request import Delta, Event, Failed

T = TypeVar("T")
Command = Callable[[], object]


MAX_EVENTS = 64


class Stream:
    """One request's events on the loop's side.  The engine never waits for a reader: once
    MAX_EVENTS are unread, more text joins that of the last.  So all of the text is held in few."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._waiting: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._events)

    def put(self, event: Event) -> None:
        last = self._events[-1] if len(self._events) >= MAX_EVENTS else None
        if isinstance(last, Delta) and isinstance(event, Delta):
            logprobs = last.logprobs + event.logprobs
            self._events[-1] = Delta(last.text + event.text, event.num_tokens, logprobs)
        else:
            self._events.append(event)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def get(self) -> Event:
        """For one reader."""
        while not self._events:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        return self._events.popleft()


class Mailbox:
    def __init__(self) -> None:
        self._commands: SimpleQueue[Command] = SimpleQueue()
        self._outbox: list[tuple[Stream, Event]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams = weakref.WeakSet[Stream]()
        self._calls = set[Future[Any]]()
        self._lost: RequestError | None = None

    def connect(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def send(self, command: Command) -> None:
        self._commands.put(command)

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run on the engine thread; the future has its result or what it raised."""
        future: Future[T] = Future()
        self._calls.add(future)
        future.add_done_callback(self._calls.discard)

        def run() -> None:
            if future.done() or not future.set_running_or_notify_cancel():
                return
            with suppress(InvalidStateError):  # it was given up meanwhile
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)

        if self._lost is not None:
            future.set_exception(self._lost)
        else:
            self.send(run)
        return future

    def stream(self) -> Stream:
        stream = Stream()
        self._streams.add(stream)
        if self._lost is not None:
            stream.put(Failed(self._lost))
        return stream

    def give_up(self, error: RequestError) -> None:
        """Nobody takes commands any more.  Every stream and every call ends with the error."""
        self._lost = error
        for stream in list(self._streams):
            stream.put(Failed(error))
        for future in list(self._calls):
            with suppress(InvalidStateError):  # it has just been answered
                future.set_exception(error)

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
