"""Streamed answers of any OpenAI-like server, with the moment at which each token came.

A thread for each stream reads; whoever made it waits.
"""

import json
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Self

import httpx

TIMEOUT_S = 600.0


class Stream:
    """One answer, most likely tokens first.  At the end of `with` it is broken off.

    `moments`: of the tokens, on the monotonic clock; each has come with a text of its own.
    """

    def __init__(self, port: int, agent: str, prompt: str, max_tokens: int) -> None:
        self.moments: list[float] = []
        self.usage: dict[str, Any] = {}
        self._url = f"http://127.0.0.1:{port}/v1/chat/completions"
        self._headers = {"X-Agent-ID": agent}
        self._body = {
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
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
        """Until its end.  Raises if it was not a whole answer, a text for each token."""
        self._thread.join()
        if self._error is not None:
            raise self._error
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
        if any(choice["delta"].get("content") for choice in chunk["choices"]):
            self.moments.append(now)
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


def gaps_during(moments: Sequence[float], began: float, ended: float) -> list[float]:
    """All that are at least partly between these two."""
    return [b - a for a, b in pairwise(moments) if b > began and a < ended]
