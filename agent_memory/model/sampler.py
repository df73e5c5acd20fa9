"""From logits to the next tokens of a step's rows.

Each request draws from its own random sequence, a function of its seed and the position alone, so
what else is in the batch, a restore or a restart changes nothing.  Engine thread only.

    logits  ─►  bias  ─►  penalties  ─►  what is allowed  ─►  temperature and filters  ─►  token

A row that none of it concerns is drawn from the model's own logits, bit for bit.

The filters are those of mlx-lm's samplers, but not compiled: those bake the numbers that a request
asks for into a kernel, so each number never seen before would stop every stream while one is made,
for more than a second on a CPU, and all of them would be kept for ever.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from agent_memory.request import SamplingParams

Sampler = Callable[[mx.array], mx.array]

LEAST_TEMPERATURE = 1e-6
"""Below it the most likely token is taken: dividing by less leaves the range of float32."""
_GOLDEN = 0x9E3779B97F4A7C15  # spreads neighbouring positions over 64 bits


class Shift(NamedTuple):
    """What is added to the logits of some tokens: ids [n] and amounts [n]; an id may come twice."""

    ids: mx.array
    amounts: mx.array


class Draw(NamedTuple):
    """How one row's token is chosen.  `sampler` None takes the most likely; `allowed`: of the
    vocabulary, None all of it."""

    sampler: Sampler | None
    seed: int
    bias: Shift | None = None
    penalties: Shift | None = None
    allowed: np.ndarray | None = None

    @property
    def is_plain(self) -> bool:
        return self.bias is None and self.penalties is None and self.allowed is None


def draw_for(params: SamplingParams, seed: int, vocab_size: int) -> Callable[[int], Draw]:
    """-> a function from the position of the wanted token to its draw."""
    bias = _bias(params)
    if params.temperature < LEAST_TEMPERATURE:
        return lambda _position: Draw(None, 0, bias)
    sampler = partial(_drawn, params=params, vocab_size=vocab_size)
    return lambda position: Draw(sampler, (seed + position * _GOLDEN) % 2**64, bias)


def _drawn(logprobs: mx.array, params: SamplingParams, vocab_size: int) -> mx.array:
    """The filters do not know of the temperature."""
    if params.top_p < 1:
        logprobs = _most_likely_up_to(logprobs, params.top_p)
    if params.min_p > 0:
        least = mx.max(logprobs, axis=-1, keepdims=True) + math.log(params.min_p)
        logprobs = _but_for(logprobs < least, logprobs)
    if 0 < params.top_k < vocab_size:
        others = mx.argpartition(-logprobs, kth=params.top_k - 1, axis=-1)[..., params.top_k :]
        logprobs = mx.put_along_axis(logprobs, others, mx.array(-mx.inf), axis=-1)
    return mx.random.categorical(logprobs * (1 / params.temperature))


def _most_likely_up_to(logprobs: mx.array, top_p: float) -> mx.array:
    """The fewest that have so much of the probability together, and the most likely in any case."""
    rising = mx.sort(logprobs, axis=-1)
    probs = mx.exp(rising)
    above = mx.cumsum(probs, axis=-1, reverse=True, inclusive=False)
    total = above[..., :1] + probs[..., :1]
    num_dropped = mx.sum(above >= top_p * total, axis=-1, keepdims=True)
    last = mx.minimum(num_dropped, logprobs.shape[-1] - 1)
    return _but_for(logprobs < mx.take_along_axis(rising, last, axis=-1), logprobs)


def _but_for(dropped: mx.array, logprobs: mx.array) -> mx.array:
    return mx.where(dropped, -mx.inf, logprobs)


def _bias(params: SamplingParams) -> Shift | None:
    if not params.logit_bias:
        return None
    ids, amounts = zip(*params.logit_bias, strict=True)
    return Shift(mx.array(ids), mx.array(amounts, mx.float32))


def penalties(params: SamplingParams, counts: Mapping[int, int]) -> Shift | None:
    """`counts`: how often each token has been generated."""
    if not counts or not (params.frequency_penalty or params.presence_penalty):
        return None
    times = np.fromiter(counts.values(), np.float32, len(counts))
    amounts = -params.presence_penalty - params.frequency_penalty * times
    ids = np.fromiter(counts, np.int32, len(counts))
    return Shift(mx.array(ids), mx.array(amounts.astype(np.float32)))


def sample(logits: mx.array, draws: Sequence[Draw]) -> mx.array:
    """logits [rows, vocab] -> token ids [rows], not evaluated."""
    assert logits.shape[0] == len(draws)
    best = mx.argmax(logits, axis=-1)
    if all(draw.sampler is None and draw.is_plain for draw in draws):
        return best
    return mx.concatenate(
        [_one(logits[i : i + 1], best[i : i + 1], d) for i, d in enumerate(draws)]
    )


def _one(row: mx.array, best: mx.array, draw: Draw) -> mx.array:
    """logits [1, vocab] and the most likely token [1] -> the token [1]."""
    if not draw.is_plain:
        row = _changed(row.astype(mx.float32), draw)
        best = mx.argmax(row, axis=-1)
    if draw.sampler is None:
        return best
    row = row.astype(mx.float32)
    mx.random.seed(draw.seed)
    drawn: mx.array = draw.sampler(row - mx.logsumexp(row, axis=-1, keepdims=True))
    return drawn


def _changed(row: mx.array, draw: Draw) -> mx.array:
    for shift in (draw.bias, draw.penalties):
        if shift is not None:
            row = row.at[:, shift.ids].add(shift.amounts)
    if draw.allowed is not None:
        row = mx.where(mx.array(draw.allowed), row, -mx.inf)
    return row
