"""What every request passes before a route sees it, and every answer on its way out.

    protocol, headers, key ─► body, to its end ─► draining? ─► routes
              │ refused
              └─► body, to its end and forgotten ─► answer

The body is always read, whole and bounded: Hypercorn's task for a request that is answered while
more than ten pieces of its body wait unread never ends.  What must be answered all the same is
answered while the rest is read away.  Bodies that go to disk: upload.py.  Event loop.
"""

import asyncio
import ipaddress
import re
from collections.abc import Callable, Collection, Mapping
from uuid import uuid4

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agent_memory.errors import Refused, RequestError, Unavailable
from agent_memory.keys import Keys
from agent_memory.server import anthropic, upload
from agent_memory.server.access import Names, caller
from agent_memory.server.failures import error_response
from agent_memory.server.sse import disconnected
from agent_memory.server.upload import Place

MAX_BODY_BYTES = 8 << 20
MAX_IGNORED_BYTES = 32 << 20
BODY_S = 30.0
RETRY_AFTER_S = 5
CHANGING = ("POST", "DELETE")

_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
_ORIGIN = re.compile(r"https?://(.+)")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

log = structlog.get_logger(__name__)


class Gate:
    """`place`: for large bodies.  `own_state`: what routes are to find of a tenant.  `num_inside`:
    requests that passed and are not yet answered."""

    def __init__(
        self,
        app: ASGIApp,
        names: Names,
        keys: Keys,
        place: Place,
        draining: Callable[[], bool],
        own_state: Callable[[str | None], Mapping[str, object]],
    ) -> None:
        self._app = app
        self._place = place
        self._names = names
        self._keys = keys
        self._draining = draining
        self._own_state = own_state
        self.num_inside = 0
        self.empty = asyncio.Event()
        self.empty.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        else:
            await self._app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["request_id"] = request_id = _request_id(Headers(scope=scope))
        names = ["X-Request-ID"]
        if anthropic.is_here(scope["path"]):
            names.append(anthropic.REQUEST_ID)
        send = self._stamped(send, dict.fromkeys(names, request_id))
        try:
            await self._check(scope, receive)
            if upload.is_upload(scope):
                await self._upload(scope, receive, send)
                return
            body = await read_body(receive)
            if body is None:
                return
            self._check_draining(scope)
        except RequestError as error:
            await _refuse(error, scope, receive, send)
            return
        await self._pass(scope, _replay(body, receive), send)

    async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises Refused."""
        file = await upload.spool(receive, self._place, upload.TAKEN[scope["path"]].most_bytes)
        if file is not None:
            with file:
                scope["state"]["upload"] = file
                await self._pass(scope, _replay(b"", receive), send)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._enter()
        try:
            await self._app(scope, receive, send)
        finally:
            self._leave()

    def _enter(self) -> None:
        self.num_inside += 1
        self.empty.clear()

    def _leave(self) -> None:
        self.num_inside -= 1
        assert self.num_inside >= 0
        if not self.num_inside:
            self.empty.set()

    async def _check(self, scope: Scope, receive: Receive) -> None:
        """Raises RequestError, with everything read that the client will send."""
        try:
            self._check_head(scope)
        except RequestError as error:
            await _read_away(receive, error)
            raise

    def _check_head(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if scope["http_version"] not in ("1.0", "1.1"):
            raise Refused(505, "http_version", "This server speaks HTTP/1.1 only.", close=True)
        check_length(headers)
        check_path(scope["path"])
        check_host(headers.getlist("host"), self._names.of(scope))
        check_origin(headers)
        scope["state"]["caller"] = asking = caller(scope["path"], headers, self._keys)
        if asking.trusted:
            scope["state"].update(self._own_state(asking.tenant))
        if scope["method"] == "POST":
            if upload.is_upload(scope):
                upload.check_type(headers, scope["path"])
            else:
                check_json(headers)
        self._check_draining(scope)

    def _check_draining(self, scope: Scope) -> None:
        if scope["method"] in CHANGING and self._draining():
            raise Unavailable(
                "The server is shutting down. Try again in a moment.",
                reason="draining",
                retry_after=RETRY_AFTER_S,
            )

    def _stamped(self, send: Send, stamps: dict[str, str]) -> Send:
        """While draining, clients are asked to let go of their connections, too."""

        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(stamps)
                if self._draining():
                    headers["Connection"] = "close"
            await send(message)

        return stamped


async def read_body(receive: Receive, *, keep: bool = True) -> bytes | None:
    """The whole body; None if the client has gone.

    One that is too large is read to its end and forgotten, so that its sender is there to hear
    of it; one that is beyond all measure, or too slow, is not.
    """
    pieces, num_bytes, more = [], 0, True
    try:
        async with asyncio.timeout(BODY_S):
            while more and num_bytes <= MAX_IGNORED_BYTES:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                piece, more = message.get("body", b""), message.get("more_body", False)
                num_bytes += len(piece)
                if keep and num_bytes <= MAX_BODY_BYTES:
                    pieces.append(piece)
                else:
                    pieces.clear()
    except TimeoutError as error:
        raise Refused(
            408, "body_timeout", f"The body did not arrive within {BODY_S:.0f} s.", close=True
        ) from error
    if num_bytes > MAX_BODY_BYTES:
        raise Refused(
            413,
            "body_too_large",
            f"The body is larger than {MAX_BODY_BYTES >> 20} MiB.",
            close=more,
        )
    return b"".join(pieces)


async def _read_away(receive: Receive, error: RequestError) -> None:
    """Raises Refused instead of the error if there is no end to it."""
    try:
        await read_body(receive, keep=False)
    except Refused as endless:
        if endless.close:
            raise endless from error


def check_length(headers: Headers) -> None:
    """Whoever stands between may read the other of both, and take the rest for a request of its
    own.  Raises Refused."""
    if "content-length" in headers and "transfer-encoding" in headers:
        raise Refused(
            400,
            "two_lengths",
            "Content-Length and Transfer-Encoding exclude each other: send one of them.",
            close=True,
        )


def check_path(path: str) -> None:
    """To a route's pattern a line break at the end is none.  Raises Refused."""
    if path.endswith("\n"):
        raise Refused(404, "not_found", "No path here ends with a line break.")


def check_host(values: list[str], names: Collection[str]) -> None:
    """A page that made a name of its own point to this machine does not get in.  Raises Refused."""
    if len(values) != 1 or not _is_ours(values[0], names):
        raise Refused(
            421, "unknown_host", "The Host header must be exactly one and name this machine."
        )


def check_origin(headers: Headers) -> None:
    """A page of another site does not get in.  Raises Refused."""
    cross_site = headers.get("sec-fetch-site") == "cross-site"
    origins = (_ORIGIN.fullmatch(value) for value in headers.getlist("origin"))
    if cross_site or not all(origin and _is_ours(origin[1], ()) for origin in origins):
        raise Refused(403, "cross_origin", "Requests of web pages from elsewhere are refused.")


def check_json(headers: Headers) -> None:
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Refused(415, "media_type", "The Content-Type must be application/json.")


def _is_ours(authority: str, names: Collection[str]) -> bool:
    """Whether `name`, `name:port` or `[address]:port` is loopback, or one of `names`."""
    parts = _HOST.fullmatch(authority)
    if parts is None:
        return False
    name = parts[1].lower().strip("[]")
    if name == "localhost" or name in names:
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _request_id(headers: Headers) -> str:
    """The client's own, if it is sane."""
    asked = headers.get("x-request-id", "")
    return asked if _REQUEST_ID.fullmatch(asked) else f"req-{uuid4().hex}"


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` as if the body had not been read yet."""
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return unread.pop() if unread else await receive()

    return replayed


async def _refuse(error: RequestError, scope: Scope, receive: Receive, send: Send) -> None:
    request_id = scope["state"]["request_id"]
    log.info("request_refused", request_id=request_id, status=error.status, code=error.code)
    reading_away = asyncio.ensure_future(disconnected(receive))
    try:
        await error_response(error, scope)(scope, receive, send)
    finally:
        reading_away.cancel()
