"""Logprobs and the most likely tokens are those of a numpy reference."""

import mlx.core as mx
import numpy as np
import pytest

from agent_memory.model.logprobs import MOST_LOGITS_BYTES, most_rows, score

VOCAB = 50
LOGITS = mx.random.normal((6, VOCAB), key=mx.random.key(4)) * 3
TOKENS = [0, 49, 7, 7, 20, 3]


@pytest.mark.parametrize("num_top", [0, 1, 5, VOCAB, VOCAB + 1])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_scores(num_top: int, dtype: mx.Dtype) -> None:
    logits = LOGITS.astype(dtype)
    scores = score(logits, mx.array(TOKENS), num_top).read()
    exact = np.array(logits.astype(mx.float32)).astype(np.float64)
    want = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    for row, token in enumerate(TOKENS):
        assert scores[row].token == token
        assert abs(scores[row].logprob - want[row, token]) < 1e-5
        order = np.lexsort((np.arange(VOCAB), -want[row]))[:num_top]
        values = [value for _, value in scores[row].top]
        assert len(values) == min(num_top, VOCAB)
        np.testing.assert_allclose(values, want[row, order], atol=1e-5)
        if dtype is mx.float32:  # bfloat16 knows many alike
            assert [one for one, _ in scores[row].top] == order.tolist()


@pytest.mark.parametrize("vocab_size", [1, 2048, 151_936, 10**9])
def test_a_step_looks_at_bounded_logits(vocab_size: int) -> None:
    rows = most_rows(vocab_size)
    assert rows == 1 or 4 * rows * vocab_size <= MOST_LOGITS_BYTES
