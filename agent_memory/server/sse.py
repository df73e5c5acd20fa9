"""Server-sent events, and answers that end when their client goes.

Knows how events look on the wire, when silence needs filling, and when a stream that fails must say
so itself.  Event loop.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any

import structlog
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agent_memory.errors import EngineFailed, RequestError

KEEP_ALIVE_S = 10.0
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
NO_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}
"""To JSON and to events they end no line, but to what many clients split lines with."""
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

log = structlog.get_logger(__name__)


def event(data: dict[str, Any]) -> bytes:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text.translate(NO_LINE_ENDS)}\n\n".encode()


def named_event(data: dict[str, Any]) -> bytes:
    """Under the name that is its `type`."""
    return f"event: {data['type']}\n".encode() + event(data)


async def with_keep_alives(
    events: AsyncGenerator[bytes, None], every_s: float, keep_alive: bytes = KEEP_ALIVE
) -> AsyncGenerator[bytes, None]:
    """`events`, and `keep_alive` whenever nothing came for `every_s`.  Closes `events`."""
    chunks = asyncio.Queue[bytes | None](1)  # more would wait here unread
    passing = asyncio.ensure_future(_pass_on(events, chunks))
    try:
        while True:
            try:
                async with asyncio.timeout(every_s):
                    chunk = await chunks.get()
            except TimeoutError:
                yield keep_alive
                continue
            if chunk is None:
                break
            yield chunk
        await passing
    finally:
        await _ended(passing)


async def _pass_on(
    events: AsyncGenerator[bytes, None], chunks: "asyncio.Queue[bytes | None]"
) -> None:
    """A task of its own: who waits for an event cannot be asked to wait less."""
    try:
        async with aclosing(events):
            async for chunk in events:
                await chunks.put(chunk)
    except Exception:
        await chunks.put(None)  # whoever waits learns why from this task
        raise
    await chunks.put(None)


class EventStream:
    """An ASGI app that sends a stream.

    Until the first event or keep-alive an error is the caller's to answer, with its own status;
    after that it ends the stream as `failure(error)` describes it, with `end` behind.  `headers` is
    asked when the answer starts, `shaped` makes an event of the failure.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        failure: Callable[[RequestError], dict[str, Any]],
        headers: Callable[[], Mapping[str, str]] = dict,
        *,
        shaped: Callable[[dict[str, Any]], bytes] = event,
        end: bytes = DONE,
        keep_alive: bytes = KEEP_ALIVE,
    ) -> None:
        self._events = events
        self._failure = failure
        self._headers = headers
        self._shaped = shaped
        self._end = end
        self._keep_alive = keep_alive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            lively = with_keep_alives(self._events, KEEP_ALIVE_S, self._keep_alive)
            async with aclosing(lively) as chunks:
                async for chunk in chunks:
                    if not started:
                        await send(_start(self._headers()))
                        started = True
                    await send(_body(chunk))
        except Exception as error:
            if not started:
                raise
            await send(_body(self._shaped(self._failure(told(error))) + self._end))
        await send(_body(b"", more=False))


class WhileConnected(Response):
    """Sends what `app` sends.  A client that goes away cancels it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = asyncio.ensure_future(self._app(scope, receive, send))
        leaving = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _ended(leaving)
            finished = answering.done()
            await _ended(answering)
        if finished:
            answering.result()


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone.  Reads away what it still sends."""
    while (await receive())["type"] != "http.disconnect":
        pass


def told(error: Exception) -> RequestError:
    """The error as a client may know it.  What we did not foresee goes to the log instead."""
    if isinstance(error, RequestError):
        return error
    log.error("request_failed", exc_info=error)
    return EngineFailed("The server failed; its log says why.", code="internal_error")


async def _ended(task: "asyncio.Future[Any]") -> None:
    task.cancel()
    await asyncio.wait({task})


def _start(more: Mapping[str, str]) -> Message:
    own = [(name.lower().encode(), value.encode()) for name, value in more.items()]
    return {"type": "http.response.start", "status": 200, "headers": [*HEADERS, *own]}


def _body(data: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}
