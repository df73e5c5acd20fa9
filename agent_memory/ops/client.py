"""An HTTP client of our own server: one conversation in, one answer and its figures out.

Knows the wire format of /v1/chat/completions as any OpenAI client does, and no more of the server.
Any thread; one at a time.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import httpx

from agent_memory.errors import ServerFailed

CONNECT_S = 10.0
SILENCE_S = 300.0

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Answer:
    """`first_token_s`: from sending the request to the first text of the answer."""

    text: str
    prompt_tokens: int
    cached_tokens: int
    first_token_s: float
    request_id: str


class Client:
    def __init__(self, port: int) -> None:
        self._http = httpx.Client(
            base_url=f"http://127.0.0.1:{port}",
            timeout=httpx.Timeout(SILENCE_S, connect=CONNECT_S),
            trust_env=False,  # a proxy for the outside world has no business here
            verify=False,  # there is no TLS, and to read all certificates takes a while
        )

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_exception: object) -> None:
        self._http.close()

    def chat(self, agent: str, messages: Sequence[Message], max_tokens: int) -> Answer:
        """The most likely answer, streamed.  Raises ServerFailed."""
        request_id = f"req-{uuid4().hex}"
        body = {
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        headers = {"X-Agent-ID": agent, "X-Request-ID": request_id}
        sent = time.monotonic()
        try:
            with self._http.stream(
                "POST", "/v1/chat/completions", json=body, headers=headers
            ) as response:
                return _answer(_chunks(response), sent, request_id)
        except httpx.HTTPError as error:
            raise ServerFailed(f"The server did not answer: {error!r}") from error


def _answer(chunks: Iterator[dict[str, Any]], sent: float, request_id: str) -> Answer:
    texts: list[str] = []
    usage: dict[str, Any] = {}
    first_token_s = 0.0
    for chunk in chunks:
        for choice in chunk["choices"]:
            if text := choice["delta"].get("content"):
                first_token_s = first_token_s or time.monotonic() - sent
                texts.append(text)
        usage = chunk.get("usage") or usage
    if not usage:
        raise ServerFailed("The answer ended before its figures came.")
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return Answer("".join(texts), usage["prompt_tokens"], cached, first_token_s, request_id)


def _chunks(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The objects of an event stream.  Raises ServerFailed where one is an error."""
    if response.status_code != httpx.codes.OK:
        response.read()
        raise ServerFailed(f"The server said {response.status_code}: {response.text}")
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            chunk: dict[str, Any] = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise ServerFailed(f"The server broke off: {chunk['error']['message']}")
            yield chunk
