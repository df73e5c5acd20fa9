"""An HTTP client of a running server's /v1/agents, /v1/models and /v1/requests.

Knows the paths and how the server says no.  Any thread; one at a time.
"""

import argparse
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import httpx

from agent_memory import keys
from agent_memory.errors import NoServer, RequestRefused, UsageError

CONNECT_S = 5.0
ANSWER_S = 120.0
PIECE_BYTES = 1 << 20
MEDIA_TYPE = "application/x-tar"

Advance = Callable[[int, int], object]
"""(bytes so far, bytes in all)"""


class AgentClient:
    """Everything raises NoServer if nobody answers, RequestRefused if the server says no.  `key`
    "": none is sent."""

    def __init__(self, url: str, key: str = "") -> None:
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"--url: {url!r} must begin with http://.")
        self._url = url.rstrip("/")
        try:
            self._http = httpx.Client(
                base_url=self._url,
                headers=bearer(key),
                timeout=httpx.Timeout(ANSWER_S, connect=CONNECT_S),
                trust_env=False,  # a proxy for the outside world has no business here
                verify=url.startswith("https://"),  # to read all certificates takes a while
            )
        except httpx.InvalidURL as error:
            raise UsageError(f"--url: {url!r} is no address: {error}.") from error

    @classmethod
    def named(cls, args: argparse.Namespace) -> Self:
        """The server and the key that a command was given.  Raises StartError."""
        return cls(args.url, keys.of_client(os.environ, args.api_key_file))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._http.close()

    def models(self) -> list[dict[str, Any]]:
        """The one that serves who names none comes first."""
        listed: list[dict[str, Any]] = self._ask("GET", "/v1/models")["data"]
        return listed

    def agents(self) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = self._ask("GET", "/v1/agents")["data"]
        return listed

    def agent(self, agent_id: str, *, text: bool = False) -> dict[str, Any]:
        return self._ask("GET", _path(agent_id) + ("?text=true" if text else ""))

    def verb(self, agent_id: str, verb: str, **fields: object) -> dict[str, Any]:
        given = {name: value for name, value in fields.items() if value is not None}
        return self._ask("POST", f"{_path(agent_id)}/{verb}", json=given)

    def remove(self, agent_id: str) -> None:
        self._ask("DELETE", _path(agent_id))

    def explanation(self, request_id: str) -> dict[str, Any]:
        return self._ask("GET", f"/v1/requests/{quote(request_id, safe='')}/explain")

    def model_verb(self, model_id: str, verb: str) -> dict[str, Any]:
        """However long it takes."""
        patient = httpx.Timeout(None, connect=CONNECT_S)
        path = f"/v1/models/{quote(model_id, safe='')}/{verb}"
        return self._ask("POST", path, json={}, timeout=patient)

    def export(self, agent_id: str, target: Path, advance: Advance) -> int:
        """Write the file, whole or not at all; -> its size."""
        new = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            num_bytes = self._download(f"{_path(agent_id)}/export", new, advance)
            new.replace(target)
        except OSError as error:
            raise UsageError(f"{target} cannot be written: {error.strerror}.") from error
        finally:
            new.unlink(missing_ok=True)
        return num_bytes

    def import_file(self, source: Path, name: str | None, advance: Advance) -> dict[str, Any]:
        try:
            num_bytes = source.stat().st_size
            with source.open("rb"):
                pass
        except OSError as error:
            raise UsageError(f"{source} cannot be read: {error.strerror}.") from error
        headers = {"Content-Type": MEDIA_TYPE, "Content-Length": str(num_bytes)}
        params = {} if name is None else {"name": name}
        return self._ask(
            "POST",
            "/v1/agents/import",
            content=_pieces(source, num_bytes, advance),
            headers=headers,
            params=params,
        )

    def _download(self, path: str, target: Path, advance: Advance) -> int:
        try:
            with self._http.stream("GET", path) as answer:
                if answer.status_code != httpx.codes.OK:
                    answer.read()
                    raise _refused(answer)
                expected, so_far = int(answer.headers["content-length"]), 0
                with open(target, "xb", opener=_private) as file:
                    for piece in answer.iter_bytes(PIECE_BYTES):
                        so_far += file.write(piece)
                        advance(so_far, expected)
                    file.flush()
                    os.fsync(file.fileno())
                return so_far
        except httpx.TransportError as error:
            raise self._gone(error) from error

    def _ask(self, method: str, path: str, **what: Any) -> dict[str, Any]:
        try:
            answer = self._http.request(method, path, **what)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise self._gone(error) from error
        if not answer.is_success:
            raise _refused(answer)
        try:
            body = answer.json() if answer.content else {}
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise NoServer(f"What answers at {self._url} is none of our servers. Correct --url.")
        return body

    def _gone(self, error: Exception) -> NoServer:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.InvalidURL):
            return NoServer(
                f"No server answers at {self._url}. Start one with 'agent-memory serve', or name "
                "the right one with --url."
            )
        return NoServer(f"The server at {self._url} broke off ({error}). Its log says why.")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def _path(agent_id: str) -> str:
    return f"/v1/agents/{quote(agent_id, safe='')}"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)  # what an agent has in mind is its owner's business


def _pieces(source: Path, num_bytes: int, advance: Advance) -> Iterator[bytes]:
    so_far = 0
    with source.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield piece
            so_far += len(piece)
            advance(so_far, num_bytes)


def _refused(answer: httpx.Response) -> RequestRefused:
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"The server said {answer.status_code}."
    return RequestRefused(str(message))
