"""mlx-lm alone, without any server: how long the work itself takes.

    python -m agent_memory.bench.bare MODEL

Each line of JSON that comes asks one thing, such as {"do": "step_s", "tokens": 2048, "rows": 1},
and one line answers it.  Ends with its input.  Knows how mlx-lm loads and computes a model, and
nothing of servers.  A process of its own; main thread.
"""

import json
import math
import os
import select
import sys
import time
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any, TextIO

import mlx.core as mx
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.utils import load

CHUNKS = (2048, 256)
"""Prompt tokens at once: the faster is taken, as a prompt of CHOSEN_AT tokens shows."""
CHOSEN_AT = 1024
SCORED_AT_ONCE = 256
TRIES = 3
SHORT_S = 1.0
"""What takes longer is tried once."""
GROUP_S = 0.2
STEPS = range(3, 32)
"""Of one group, fewest and most."""
ROOM = 256
IDLE_S = 5.0
"""After this the model's memory is given back, for the servers that are measured."""


class Bare:
    """One model, loaded when it is asked for."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._loaded: tuple[Any, Any] | None = None
        self._chunk: int | None = None

    def free(self) -> None:
        self._loaded = None
        mx.clear_cache()

    def load_s(self) -> float:
        """From files that are in the page cache by now to the end of a first step."""
        self._get()
        seconds = []
        for _ in range(TRIES):
            self.free()
            began = time.monotonic()
            model, _ = self._get()
            mx.eval(model(mx.array([[1]]), cache=make_prompt_cache(model)))
            seconds.append(time.monotonic() - began)
        return min(seconds)

    def prefill_s(self, tokens: int) -> float:
        """A prompt that nobody has seen, to the first token of the answer."""
        if tokens <= min(CHUNKS):
            return self._prefill(tokens, tokens)
        if self._chunk is None:
            seconds = {chunk: self._prefill(CHOSEN_AT, chunk) for chunk in CHUNKS}
            self._chunk = min(CHUNKS, key=seconds.__getitem__)
        return self._prefill(tokens, self._chunk)

    def step_s(self, tokens: int, rows: int = 1) -> float:
        """The next token of so many answers at once, each so many tokens long by now."""
        model, _ = self._get()
        cache = self._cache(tokens, rows)
        token = mx.zeros((rows,), mx.uint32)
        token = _steps(model, cache, token, 2)
        began = time.monotonic()
        token = _steps(model, cache, token, 2)
        count = round(GROUP_S / max((time.monotonic() - began) / 2, 1e-6))
        count = min(max(count, STEPS.start), STEPS.stop)
        seconds = []
        for _ in range(TRIES):
            began = time.monotonic()
            token = _steps(model, cache, token, count)
            seconds.append((time.monotonic() - began) / count)
        return min(seconds)

    def kv(self) -> dict[str, int]:
        """How many values K and V of one token have in all layers, and of how many bits."""
        model, _ = self._get()
        cache = make_prompt_cache(model)
        mx.eval(model(mx.array([[1]]), cache=cache))
        layers = [layer.state[:2] for layer in cache if type(layer) is KVCache]
        kept: list[mx.array] = [array for layer in layers for array in layer]
        values = sum(math.prod(array.shape) // array.shape[2] for array in kept)
        return {"values": values, "bits": 8 * kept[0].itemsize if kept else 0}

    def score(self, text: str, tokens: int) -> dict[str, Any]:
        """The first tokens of this text, and the sum of the log probabilities of all but one."""
        model, tokenizer = self._get()
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)[:tokens]
        cache = make_prompt_cache(model)
        total = 0.0
        for start in range(0, len(ids) - 1, SCORED_AT_ONCE):
            end = min(start + SCORED_AT_ONCE, len(ids) - 1)
            logits = model(mx.array([ids[start:end]]), cache=cache)[0].astype(mx.float32)
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            wanted = mx.array(ids[start + 1 : end + 1])[:, None]
            summed: Any = mx.take_along_axis(logprobs, wanted, axis=-1).sum().item()
            total += summed
        return {"ids": ids, "logprob": total}

    def _get(self) -> tuple[Any, Any]:
        if self._loaded is None:
            model, tokenizer, *_ = load(self._source)
            self._loaded = model, tokenizer
        return self._loaded

    def _ids(self, tokens: int) -> list[int]:
        """Of ordinary text, over and over."""
        _, tokenizer = self._get()
        text = "\n".join(topics.values())[: 8 * tokens]
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return (ids * (tokens // len(ids) + 1))[:tokens]

    def _prefill(self, tokens: int, chunk: int) -> float:
        """The best of a few, if it is short."""
        ids = mx.array([self._ids(tokens)])
        self._computed(ids[:, :8], 8)  # whatever the first time needs
        seconds = [self._computed(ids, chunk)]
        while len(seconds) < TRIES and seconds[-1] < SHORT_S:
            seconds.append(self._computed(ids, chunk))
        mx.clear_cache()
        return min(seconds)

    def _computed(self, ids: mx.array, chunk: int) -> float:
        model, _ = self._get()
        cache, last = make_prompt_cache(model), ids.shape[1] - 1
        began = time.monotonic()
        for start in range(0, last, chunk):
            model(ids[:, start : min(start + chunk, last)], cache=cache)
            mx.eval([layer.state for layer in cache])
        mx.eval(model(ids[:, last:], cache=cache)[:, -1].argmax(-1))
        return time.monotonic() - began

    def _cache(self, tokens: int, rows: int) -> list[Any]:
        """As after so many tokens.  Plain K and V are made up: what they are takes no time."""
        model, _ = self._get()
        cache: list[Any] = make_prompt_cache(model)
        ids = mx.array([self._ids(tokens)] * rows)
        if any(type(layer) is not KVCache for layer in cache):
            for start in range(0, tokens, CHUNKS[1]):
                model(ids[:, start : start + CHUNKS[1]], cache=cache)
                mx.eval([layer.state for layer in cache])
            return cache
        mx.eval(model(ids[:, :1], cache=cache))
        for layer in cache:
            layer.state = _made_up(layer.keys, tokens), _made_up(layer.values, tokens), tokens
        mx.eval([layer.state[:2] for layer in cache])
        return cache


def _made_up(like: mx.array, tokens: int) -> mx.array:
    rows, heads, _, width = like.shape
    return mx.random.normal((rows, heads, tokens + ROOM, width)).astype(like.dtype)


def _steps(model: Any, cache: list[Any], token: mx.array, count: int) -> mx.array:
    """Each is begun before the one before it is waited for, as mlx-lm does."""
    for _ in range(count):
        following = model(token[:, None], cache=cache)[:, -1].argmax(-1)
        mx.async_eval(following)
        mx.eval(token)
        token = following
    mx.eval(token)
    return token


def serve(bare: Bare, asked: TextIO, answers: TextIO) -> None:
    doing: dict[str, Callable[..., Any]] = {
        "load_s": bare.load_s,
        "prefill_s": bare.prefill_s,
        "step_s": bare.step_s,
        "kv": bare.kv,
        "score": bare.score,
    }
    idle_s: float | None = None
    while True:
        if not select.select([asked], [], [], idle_s)[0]:
            bare.free()
            idle_s = None
            continue
        line = asked.readline()
        if not line:
            return
        wanted = json.loads(line)
        answers.write(json.dumps({"value": doing[wanted.pop("do")](**wanted)}) + "\n")
        answers.flush()
        idle_s = IDLE_S


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries say is no answer
    serve(Bare(sys.argv[1]), sys.stdin, answers)


if __name__ == "__main__":
    main()
