"""Streams on the wire, and what happens when their client goes."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from agent_memory.errors import EngineFailed, NotFound, RequestError
from agent_memory.server import sse
from agent_memory.server.openai import error_body
from agent_memory.server.sse import DONE, KEEP_ALIVE, EventStream, WhileConnected

Chunks = AsyncGenerator[bytes, None]


class Client:
    """The other end of one ASGI call: what was sent, and when it leaves."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.leaves = asyncio.Event()

    async def receive(self) -> Message:
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    async def call(self, app: Any) -> None:
        await app({"type": "http"}, self.receive, self.send)


class Source:
    """A stream of b"1", b"2", … with a pause before each; remembers that it was closed."""

    def __init__(self, count: int, pause_s: float = 0.0, error: Exception | None = None) -> None:
        self.closed = False
        self._count = count
        self._pause_s = pause_s
        self._error = error

    async def __call__(self) -> AsyncGenerator[bytes, None]:
        try:
            for n in range(self._count):
                await asyncio.sleep(self._pause_s)
                yield b"%d" % (n + 1)
            if self._error:
                raise self._error
        finally:
            self.closed = True


def test_an_event_is_one_line_whatever_it_holds() -> None:
    raw = sse.event({"text": "a\nb\r\n\u2028é\N{GRINNING FACE}"})
    assert raw.startswith(b"data: {") and raw.endswith(b"}\n\n")
    assert raw.count(b"\n") == 2 and b"\r" not in raw
    assert len(sse.event({"text": "\x85\u2028\u2029"}).decode().splitlines()) == 2
    assert json.loads(raw.removeprefix(b"data: "))["text"] == "a\nb\r\n\u2028é\N{GRINNING FACE}"


@pytest.mark.requirement("L-06")
async def test_silence_is_filled_with_comments() -> None:
    source = Source(2, pause_s=0.25)
    chunks = [chunk async for chunk in sse.with_keep_alives(source(), every_s=0.1)]
    assert chunks == [KEEP_ALIVE, KEEP_ALIVE, b"1", KEEP_ALIVE, KEEP_ALIVE, b"2"]
    assert source.closed


async def test_a_lively_stream_has_none() -> None:
    source = Source(1000)
    chunks = [chunk async for chunk in sse.with_keep_alives(source(), every_s=5)]
    assert chunks == [b"%d" % (n + 1) for n in range(1000)]


@pytest.mark.parametrize("pause_s", [0.0, 60.0])
async def test_closing_it_early_closes_the_source(pause_s: float) -> None:
    source = Source(10, pause_s)
    chunks = sse.with_keep_alives(source(), every_s=0.01)
    await anext(chunks)
    await chunks.aclose()
    assert source.closed


async def test_a_stream_is_sent_as_events() -> None:
    client = Client()
    await client.call(EventStream(Source(2)(), error_body))
    assert client.sent[0]["status"] == 200
    assert (b"content-type", b"text/event-stream; charset=utf-8") in client.sent[0]["headers"]
    assert client.body == b"12"
    assert [message.get("more_body") for message in client.sent[1:]] == [True, True, False]


async def test_an_error_before_the_first_event_has_its_own_status() -> None:
    client = Client()
    with pytest.raises(NotFound):
        await client.call(EventStream(Source(0, error=NotFound("no"))(), error_body))
    assert client.sent == []


@pytest.mark.requirement("B-04", "S-16")
@pytest.mark.parametrize(
    ("error", "code"), [(EngineFailed("broken"), "engine_error"), (KeyError("x"), "internal_error")]
)
async def test_an_error_later_ends_the_stream_in_form(error: Exception, code: str) -> None:
    client = Client()
    await client.call(EventStream(Source(1, error=error)(), error_body))
    first, _, rest = client.body.partition(b"data: ")
    told, end, nothing = rest.partition(b"\n\n" + DONE)
    assert (first, end, nothing) == (b"1", b"\n\n" + DONE, b"")
    assert json.loads(told)["error"]["code"] == code
    assert client.sent[-1]["more_body"] is False
    assert isinstance(error, RequestError) or b"KeyError" not in told


async def test_an_api_has_its_own_events_signs_of_life_and_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.1)
    client, ping = Client(), sse.named_event({"type": "ping"})
    assert ping == b'event: ping\ndata: {"type":"ping"}\n\n'
    stream = EventStream(
        Source(1, pause_s=0.15, error=EngineFailed("broken"))(),
        lambda error: {"type": "error", "message": error.message},
        shaped=sse.named_event,
        end=b"",
        keep_alive=ping,
    )
    await client.call(stream)
    told = b'event: error\ndata: {"type":"error","message":"broken"}\n\n'
    assert client.body == ping + b"1" + told


async def test_a_client_that_goes_cancels_its_answer() -> None:
    client, source = Client(), Source(1000, pause_s=0.01)
    call = asyncio.create_task(client.call(WhileConnected(EventStream(source(), error_body))))
    await asyncio.sleep(0.1)
    client.leaves.set()
    await asyncio.wait_for(call, 1)
    num_sent = len(client.sent)
    assert source.closed and 1 < num_sent < 50


async def test_a_client_that_goes_while_nothing_is_sent_yet() -> None:
    client, cancelled = Client(), asyncio.Event()

    async def thinking(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    call = asyncio.create_task(client.call(WhileConnected(thinking)))
    await asyncio.sleep(0.02)
    client.leaves.set()
    await asyncio.wait_for(call, 1)
    assert cancelled.is_set() and client.sent == []


async def test_an_answers_own_error_is_its_callers() -> None:
    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        raise NotFound("no")

    with pytest.raises(NotFound):
        await Client().call(WhileConnected(failing))


async def test_more_headers_are_asked_for_when_the_answer_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.05)
    for pause_s, expected in ((0.0, True), (0.2, False)):
        client, more = Client(), dict[str, str]()

        async def events(pause: float = pause_s, found: dict[str, str] = more) -> Chunks:
            await asyncio.sleep(pause)
            found["X-Cache"] = "hit"
            yield b"1"

        await client.call(EventStream(events(), error_body, more.copy))
        headers = dict(client.sent[0]["headers"])
        assert (headers.get(b"x-cache") == b"hit") is expected
        assert headers[b"cache-control"] == b"no-cache"
