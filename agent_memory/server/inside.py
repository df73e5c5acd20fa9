"""A request made inside the server: through the routes as any other, without a socket.

Event loop.
"""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message


@dataclass(frozen=True, slots=True)
class Answered:
    status: int
    headers: Mapping[str, str]
    body: bytes


async def post(
    app: ASGIApp,
    path: str,
    values: Mapping[str, Any],
    headers: Mapping[str, str],
    state: Mapping[str, object],
) -> Answered:
    """Cancelling it is what a client's leaving is to others.  `state`: as the gate leaves it."""
    unread: list[Message] = [{"type": "http.request", "body": json.dumps(values).encode()}]
    started: Message = {}
    body = bytearray()

    async def receive() -> Message:
        return unread.pop() if unread else await asyncio.Future()

    async def send(message: Message) -> None:
        started.update({} if started else message)
        body.extend(message.get("body", b""))

    scope = {
        "type": "http",
        "http_version": "1.1",
        "scheme": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": _raw({"content-type": "application/json", **headers}),
        "state": dict(state),
    }
    try:
        await app(scope, receive, send)
    except Exception:
        if not started:
            raise  # else it was answered, and logged
    told = {name.decode(): value.decode() for name, value in started["headers"]}
    return Answered(started["status"], told, bytes(body))


def _raw(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]
