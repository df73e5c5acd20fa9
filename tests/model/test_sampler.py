"""Draws depend on the request alone, and only allowed tokens are drawn."""

import time
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import make_sampler

from agent_memory.model.sampler import Draw, draw_for, penalties, sample
from agent_memory.request import SamplingParams

VOCAB = 50
LOGITS = mx.random.normal((8, VOCAB), key=mx.random.key(3)) * 2


def drawn(
    params: SamplingParams, logits: mx.array, seed: int = 1, positions: range = range(1)
) -> list[int]:
    """One token for each position, all from the same row of logits."""
    draw = draw_for(params, seed, VOCAB)
    rows = mx.broadcast_to(logits, (len(positions), VOCAB))
    tokens: list[int] = np.array(sample(rows, [draw(p) for p in positions])).tolist()
    return tokens


def likely(logits: mx.array) -> list[int]:
    """Token ids, the most likely first."""
    order: list[int] = np.argsort(-np.array(logits)).tolist()
    return order


@pytest.mark.parametrize("others", [0, 1, 5])
@pytest.mark.parametrize("place", [0, 2])
def test_the_token_does_not_depend_on_the_rest_of_the_batch(others: int, place: int) -> None:
    params = SamplingParams(temperature=0.8, top_p=0.95)
    draw = draw_for(params, 42, VOCAB)
    greedy = draw_for(SamplingParams(temperature=0), 0, VOCAB)
    for position in range(20):
        alone = sample(LOGITS[:1], [draw(position)])
        rest: list[Draw] = [draw_for(params, s, VOCAB)(position) for s in range(others)]
        draws = [*rest, greedy(0), greedy(0)]
        at = min(place, len(draws))
        rows = mx.concatenate([LOGITS[1 : 1 + at], LOGITS[:1], LOGITS[1 + at : len(draws) + 1]])
        together = sample(rows, [*draws[:at], draw(position), *draws[at:]])
        assert int(together[at]) == int(alone[0])


def test_seed_and_position_each_change_the_draw() -> None:
    flat = mx.zeros((1, VOCAB))
    params = SamplingParams()
    one, again, other = (drawn(params, flat, s, range(100)) for s in (7, 7, 8))
    assert one == again
    assert sum(a == b for a, b in zip(one, other, strict=True)) < 20  # two by chance
    assert len(set(one)) > VOCAB // 2
    assert drawn(params, flat, 7, range(1, 101))[:99] == one[1:]


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**63 - 1])
def test_any_seed_of_64_bits_will_do(seed: int) -> None:
    assert drawn(SamplingParams(), LOGITS[:1], seed) == drawn(SamplingParams(), LOGITS[:1], seed)


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-9])
def test_no_temperature_takes_the_most_likely(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, top_p=0.5, top_k=3, min_p=0.1)
    for row in range(8):
        tokens = drawn(params, LOGITS[row : row + 1], positions=range(5))
        assert tokens == likely(LOGITS[row])[:1] * 5


@pytest.mark.parametrize("top_p", [5e-324, 1e-50, 1e-40, 1e-12])
def test_hardly_any_top_p_takes_it_too(top_p: float) -> None:
    tokens = drawn(SamplingParams(top_p=top_p), LOGITS[:1], positions=range(20))
    assert set(tokens) == {likely(LOGITS[0])[0]}


def test_hardly_any_temperature_takes_it_too() -> None:
    params = SamplingParams(temperature=1e-6)
    assert set(drawn(params, LOGITS[:1], positions=range(50))) == {likely(LOGITS[0])[0]}


@pytest.mark.parametrize("top_k", [VOCAB, VOCAB + 1, 10**6])
def test_top_k_of_all_there_are_is_no_filter(top_k: int) -> None:
    tokens = drawn(SamplingParams(top_k=top_k), LOGITS[:1], positions=range(100))
    assert tokens == drawn(SamplingParams(), LOGITS[:1], positions=range(100))


@pytest.mark.parametrize("top_k", [1, 3, VOCAB - 1])
def test_top_k_draws_from_the_k_most_likely(top_k: int) -> None:
    tokens = drawn(SamplingParams(top_k=top_k, temperature=3.0), LOGITS[:1], positions=range(400))
    assert set(tokens) <= set(likely(LOGITS[0])[:top_k])
    assert len(set(tokens)) >= min(top_k, 30)


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.7, 0.99])
def test_top_p_draws_from_the_fewest_that_reach_it(top_p: float) -> None:
    p = np.exp(np.array(LOGITS[0], np.float64))
    p /= p.sum()
    order = likely(LOGITS[0])
    reached = np.cumsum(p[order])
    allowed = set(order[: int(np.searchsorted(reached, top_p)) + 1])
    tokens = drawn(SamplingParams(top_p=top_p), LOGITS[:1], positions=range(400))
    assert set(tokens) <= allowed
    assert len(set(tokens)) >= min(len(allowed), 4)


@pytest.mark.parametrize("min_p", [0.02, 0.2, 1.0])
def test_min_p_draws_from_those_near_the_most_likely(min_p: float) -> None:
    p = np.exp(np.array(LOGITS[0], np.float64))
    allowed = set(np.flatnonzero(p >= min_p * p.max() * (1 - 1e-6)).tolist())
    tokens = drawn(SamplingParams(min_p=min_p), LOGITS[:1], positions=range(400))
    assert set(tokens) <= allowed
    assert len(set(tokens)) >= min(len(allowed), 3)


def test_numbers_never_asked_for_before_make_nobody_wait() -> None:
    """A kernel compiled for each would hold every stream up for more than a second on a CPU."""
    began = time.monotonic()
    for n in range(20):
        params = SamplingParams(temperature=0.5 + n / 997, top_p=0.9 - n / 991, min_p=n / 983)
        drawn(params, LOGITS[:1])
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("asked", [{}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 5}])
def test_what_is_drawn_is_what_mlx_lm_draws(asked: dict[str, Any]) -> None:
    params = replace(SamplingParams(temperature=0.7), **asked)
    theirs = make_sampler(temp=0.7, **asked)
    for position in range(50):
        draw = draw_for(params, 7, VOCAB)(position)
        mx.random.seed(draw.seed)
        logprobs = LOGITS - mx.logsumexp(LOGITS, axis=-1, keepdims=True)
        expected = theirs(logprobs[:1])
        assert sample(LOGITS[:1], [draw]).tolist() == expected.tolist()


def test_draws_follow_the_probabilities() -> None:
    p = np.array([0.5, 0.25, 0.15, 0.1])
    logits = mx.log(mx.array([[*p.tolist(), *[1e-30] * (VOCAB - 4)]]))
    n = 4000
    tokens = drawn(SamplingParams(), logits, seed=11, positions=range(n))
    shares = np.bincount(tokens, minlength=4) / n
    np.testing.assert_allclose(shares[:4], p, atol=0.035)  # over four standard deviations


def test_bfloat16_logits_are_drawn_from_in_float32() -> None:
    params = SamplingParams(top_p=0.9)
    rounded = LOGITS[:1].astype(mx.bfloat16)
    ours = drawn(params, rounded, positions=range(50))
    assert ours == drawn(params, rounded.astype(mx.float32), positions=range(50))


CHANGES = [
    SamplingParams(0, logit_bias=((3, 2.5), (7, -1.5), (3, 1.0))),
    SamplingParams(0, frequency_penalty=0.7),
    SamplingParams(0, presence_penalty=-0.9),
    SamplingParams(0, frequency_penalty=-0.3, presence_penalty=1.1, logit_bias=((9, 4.0),)),
]
COUNTS = {3: 2, 9: 1, 41: 7}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("params", CHANGES)
def test_bias_penalties_and_mask_are_those_of_a_numpy_reference(
    params: SamplingParams, masked: bool
) -> None:
    allowed = np.random.default_rng(5).random(VOCAB) < 0.3 if masked else None
    want = np.array(LOGITS)
    for token, amount in params.logit_bias:
        want[:, token] += np.float32(amount)
    for token, count in COUNTS.items():
        want[:, token] -= np.float32(params.presence_penalty + params.frequency_penalty * count)
    if allowed is not None:
        want[:, ~allowed] = -np.inf
    draw = draw_for(params, 0, VOCAB)(0)._replace(penalties=penalties(params, COUNTS))
    tokens = np.array(sample(LOGITS, [draw._replace(allowed=allowed)] * len(want)))
    np.testing.assert_array_equal(tokens, want.argmax(-1))


def test_what_is_drawn_is_allowed_and_follows_the_changed_probabilities() -> None:
    params = SamplingParams(logit_bias=((4, 30.0), (5, 30.0), (6, 60.0)))
    allowed = np.ones(VOCAB, bool)
    allowed[6] = False
    draw = draw_for(params, 3, VOCAB)
    rows = mx.zeros((400, VOCAB))
    tokens = np.array(sample(rows, [draw(p)._replace(allowed=allowed) for p in range(400)]))
    shares = np.bincount(tokens, minlength=VOCAB) / 400
    assert shares[[4, 5]].sum() == 1 and abs(shares[4] - 0.5) < 0.1


def test_rows_that_nothing_is_asked_of_are_drawn_as_ever() -> None:
    plain = [draw_for(SamplingParams(), 8, VOCAB)(p) for p in range(4)] + [Draw(None, 0)] * 4
    alone = np.array(sample(LOGITS, plain))
    changed = [draw._replace(allowed=np.arange(VOCAB) == 11) for draw in plain]
    mixed = [a if row % 2 else b for row, (a, b) in enumerate(zip(plain, changed, strict=True))]
    tokens = np.array(sample(LOGITS, mixed))
    assert (tokens[1::2] == alone[1::2]).all() and (tokens[::2] == 11).all()
