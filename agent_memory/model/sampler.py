"""From logits to the next tokens of a step's rows, with mlx-lm's samplers.

Each request draws from its own random sequence, a function of its seed and the position alone, so
what else is in the batch, a restore or a restart changes nothing.  Engine thread only.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx
from mlx_lm.sample_utils import make_sampler

from agent_memory.request import SamplingParams

Sampler = Callable[[mx.array], mx.array]

LEAST_TEMPERATURE = 1e-6
"""Below it the most likely token is taken: dividing by less leaves the range of float32."""
_GOLDEN = 0x9E3779B97F4A7C15  # spreads neighbouring positions over 64 bits


class Draw(NamedTuple):
    """How one row's token is chosen.  `sampler` None takes the most likely."""

    sampler: Sampler | None
    seed: int


def draw_for(params: SamplingParams, seed: int, vocab_size: int) -> Callable[[int], Draw]:
    """-> a function from the position of the wanted token to its draw."""
    if params.temperature < LEAST_TEMPERATURE:
        return lambda _position: Draw(None, 0)
    sampler = make_sampler(
        temp=params.temperature,
        top_p=params.top_p,
        min_p=params.min_p,
        top_k=params.top_k if params.top_k < vocab_size else 0,  # all of them: no filter
    )
    return lambda position: Draw(sampler, (seed + position * _GOLDEN) % 2**64)


def sample(logits: mx.array, draws: Sequence[Draw]) -> mx.array:
    """logits [rows, vocab] -> token ids [rows], not evaluated."""
    assert logits.shape[0] == len(draws)
    best = mx.argmax(logits, axis=-1)
    if all(draw.sampler is None for draw in draws):
        return best
    rows = []
    for i, (sampler, seed) in enumerate(draws):
        if sampler is None:
            rows.append(best[i : i + 1])
        else:
            row = logits[i : i + 1].astype(mx.float32)
            mx.random.seed(seed)
            rows.append(sampler(row - mx.logsumexp(row, axis=-1, keepdims=True)))
    return mx.concatenate(rows)
