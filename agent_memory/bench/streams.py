"""Streamed answers of any OpenAI-like server, with the moment at which each token came.

Knows the wire format of /v1/chat/completions as any client does, and of no server more than its
address.  A thread for each stream reads; whoever made it waits.
"""

import json
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Self

import httpx

from agent_memory.errors import ServerFailed
from agent_memory.ops.agent_client import bearer

TIMEOUT_S = 600.0
TEXTS = ("content", "reasoning_content", "reasoning")

Message = dict[str, str]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


class Stream:
    """One answer, most likely tokens first.  At the end of `with` it is broken off.

    `url`: the server's, without a path.  `moments`: of the tokens, on the monotonic clock; each has
    come with a text of its own.  `text`: all of it so far.
    """

    def __init__(
        self,
        url: str,
        agent: str,
        messages: str | Sequence[Message],
        max_tokens: int,
        model: str | None = None,
        key: str = "",
    ) -> None:
        """`messages`: a text alone is what the user says first.  No `model`: the server's own.
        `key`: "" where none is asked for."""
        self.moments: list[float] = []
        self.text = ""
        self.usage: dict[str, Any] = {}
        self._url = f"{url}/v1/chat/completions"
        self._headers = {"X-Agent-ID": agent, **bearer(key)}
        said = [user(messages)] if isinstance(messages, str) else list(messages)
        self._body: dict[str, Any] = {
            "messages": said,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if model is not None:
            self._body["model"] = model
        self._enough = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._read)
        self.sent = time.monotonic()
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._enough.set()
        self._thread.join()

    @property
    def prompt_tokens(self) -> int:
        """Raises ServerFailed."""
        if "prompt_tokens" not in self.usage:
            raise ServerFailed(
                f"{self._url} does not tell how many tokens a streamed answer's prompt had, so "
                "nothing can be compared with it. It has to know stream_options.include_usage."
            )
        return int(self.usage["prompt_tokens"])

    @property
    def cached_tokens(self) -> int:
        return int((self.usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0))

    @property
    def first_token_s(self) -> float:
        return self.moments[0] - self.sent

    def wait_for(self, num_tokens: int) -> None:
        while len(self.moments) < num_tokens:
            if not self._thread.is_alive():
                raise RuntimeError(f"ended after {len(self.moments)} tokens: {self._error!r}")
            time.sleep(0.005)

    def wait(self) -> Self:
        """Until its end.  Raises what went wrong, also where nothing came."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        if not self.moments:
            raise ServerFailed("The answer has no text.")
        return self

    def wait_whole(self) -> Self:
        """Also that it has all its tokens, with a text for each."""
        self.wait()
        max_tokens, told = self._body["max_tokens"], self.usage["completion_tokens"]
        assert told == max_tokens, f"{told} tokens instead of {max_tokens}: ended its turn"
        assert len(self.moments) == told, f"{told} tokens came in {len(self.moments)} pieces"
        return self

    def _read(self) -> None:
        try:
            with (
                httpx.Client(timeout=TIMEOUT_S, trust_env=False, verify=False) as http,
                http.stream("POST", self._url, json=self._body, headers=self._headers) as response,
            ):
                response.raise_for_status()
                for line in response.iter_lines():
                    self._take(line, time.monotonic())
                    if self._enough.is_set():
                        return
        except Exception as error:
            self._error = error

    def _take(self, line: str, now: float) -> None:
        if not line.startswith("data: {"):
            return
        chunk = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            raise RuntimeError(chunk["error"])
        pieces = [choice["delta"].get(kind) for choice in chunk["choices"] for kind in TEXTS]
        if any(pieces):
            self.moments.append(now)
            self.text += "".join(piece for piece in pieces if piece)
        self.usage = chunk.get("usage") or self.usage


def gaps_between(moments: Sequence[float]) -> list[float]:
    return [b - a for a, b in pairwise(moments)]


def tokens_per_second(streams: Sequence[Stream]) -> float:
    """Of all together, from when the last of them begins to answer to when the first ends."""
    began = max(stream.moments[0] for stream in streams)
    ended = min(stream.moments[-1] for stream in streams)
    assert ended > began, "never were all of them answered at once"
    count = sum(began < at <= ended for stream in streams for at in stream.moments)
    return count / (ended - began)


def overall_tokens_per_second(streams: Sequence[Stream]) -> float:
    """Of all together, from when the first of them was sent to the last token, waiting included."""
    began = min(stream.sent for stream in streams)
    ended = max(stream.moments[-1] for stream in streams)
    return sum(len(stream.moments) for stream in streams) / (ended - began)


def gaps_during(moments: Sequence[float], began: float, ended: float) -> list[float]:
    """All that are at least partly between these two."""
    return [b - a for a, b in pairwise(moments) if b > began and a < ended]
