"""Who may ask, and under which names this machine is asked.

With keys every path needs one, but for those listed here: a route cannot forget to ask.  Some are
the owner's alone.  Knows headers, not where they come from.  Event loop.
"""

import socket
from collections.abc import Awaitable, Callable
from functools import wraps

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from agent_memory.config import is_loopback
from agent_memory.errors import Refused, Unauthorized
from agent_memory.keys import Caller, Keys

OPEN = ("/health", "/healthz", "/readyz")
"""What a supervisor asks.  Whoever brings no key is told neither names nor reasons there."""

BEARER = "bearer "


def caller(path: str, headers: Headers, keys: Keys) -> Caller:
    """Of several keys the first that is known counts.  Raises Unauthorized."""
    if not keys:
        return Caller()
    brought = brought_keys(headers)
    if known := next(filter(None, map(keys.caller, brought)), None):
        return known
    if path in OPEN:
        return Caller(trusted=False)
    if brought:
        raise Unauthorized("invalid_api_key", "The key that was sent is none of this server's.")
    raise Unauthorized(
        "missing_api_key",
        "This server asks for a key. Send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'; "
        "the commands of agent-memory take it from AGENT_MEMORY_API_KEY or --api-key-file.",
    )


def brought_keys(headers: Headers) -> list[str]:
    """Clients that know two ways use both."""
    given = headers.getlist("authorization")
    bearers = [text[len(BEARER) :].strip() for text in given if text.lower().startswith(BEARER)]
    return [key for key in (*bearers, *headers.getlist("x-api-key")) if key]


def for_owner(route: Route) -> Route:
    """The same, for whoever may see and change what concerns everybody."""
    endpoint: Callable[[Request], Awaitable[Response]] = route.endpoint

    @wraps(endpoint)
    async def guarded(request: Request) -> Response:
        asking: Caller = request.state.caller
        if not asking.is_owner:
            raise Refused(
                403,
                "owner_key_needed",
                "This concerns the whole server and takes a key of its owner: one that has no "
                "tenant before it in --api-keys-file.",
            )
        return await endpoint(request)

    return Route(route.path, guarded, methods=route.methods)


class Names:
    """`bound`: the host listened on, None for a Unix socket."""

    def __init__(self, bound: str | None) -> None:
        self._always = frozenset({bound.lower()} if bound else ())
        self._is_open = bound is not None and not is_loopback(bound)
        if self._is_open:
            self._always |= {socket.gethostname().lower()}

    def of(self, scope: Scope) -> frozenset[str]:
        """Beside those of loopback.  The address that was called is known of every connection."""
        if self._is_open and scope["server"]:
            return self._always | {scope["server"][0].lower()}
        return self._always
