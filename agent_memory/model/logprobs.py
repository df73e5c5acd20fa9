"""How likely a step's tokens were by the model's own logits, before anything changed these.

Knows rows of logits and the tokens that followed.  Engine thread only.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from agent_memory.request import TokenLogprob

MOST_LOGITS_BYTES = 64 << 20
"""Of prompts' rows in a step, as float32; looking at them takes about three times that."""


def most_rows(vocab_size: int) -> int:
    """Of a prompt that is scored, in one step."""
    return max(1, MOST_LOGITS_BYTES // (4 * vocab_size))


@dataclass(slots=True)
class Scores:
    """Of some rows, on their way: tokens [rows] and their logprobs [rows]; of the `num_top` most
    likely the ids and logprobs [rows, num_top], in any order, None for 0."""

    tokens: mx.array
    own: mx.array
    top: tuple[mx.array, mx.array] | None

    @property
    def arrays(self) -> list[mx.array]:
        return [self.tokens, self.own, *(self.top or ())]

    def read(self) -> list[TokenLogprob]:
        """Waits for them.  The most likely first, of two alike the lower id."""
        tokens, own = np.array(self.tokens).tolist(), np.array(self.own).tolist()
        if self.top is None:
            return [TokenLogprob(*pair) for pair in zip(tokens, own, strict=True)]
        ids, values = (np.array(array) for array in self.top)
        order = np.lexsort((ids, -values), axis=-1)
        ids = np.take_along_axis(ids, order, -1).tolist()
        values = np.take_along_axis(values, order, -1).tolist()
        rows = zip(tokens, own, ids, values, strict=True)
        return [TokenLogprob(t, o, tuple(zip(i, v, strict=True))) for t, o, i, v in rows]


def score(logits: mx.array, tokens: mx.array, num_top: int) -> Scores:
    """logits [rows, vocab], tokens [rows] -> their scores, not evaluated."""
    assert logits.shape[0] == tokens.size
    logits = logits.astype(mx.float32)
    total = mx.logsumexp(logits, axis=-1, keepdims=True)
    own = mx.take_along_axis(logits, tokens[:, None], axis=-1) - total
    num_top = min(num_top, logits.shape[-1])
    if not num_top:
        return Scores(tokens, own[:, 0], None)
    ids = mx.argpartition(logits, kth=-num_top, axis=-1)[:, -num_top:]
    return Scores(tokens, own[:, 0], (ids, mx.take_along_axis(logits, ids, axis=-1) - total))
