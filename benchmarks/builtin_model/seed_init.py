"""A beginning that saves most of the training: two layers that nearly recall already.

To recall, a model needs an induction circuit: one layer's heads tell each token what stood before
it, the next layer's look for the place where the same tokens stood before, and copy what followed.
From random weights that takes millions of tokens to emerge.  Here layer 0 and layer 1 start near
one; all of it stays trainable.

What the 256 numbers of the residual stream hold at first:

    0 constant   1 … 127 the token itself   128 … 255 the three tokens before it (see SLOTS)
"""

import math

import mlx.core as mx
import numpy as np
from mlx_lm.models.llama import Attention, Model

Matrix = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

HIDDEN, HEAD, KV_HEADS = 256, 64, 2
EMBEDDING, CONSTANT, COPY, SHARPNESS, MATCH = 0.1, 0.4, 3.0, 1.4, 1.5
SLOTS = ((128, 48), (176, 40), (216, 40))
"""(first number, how many) in the residual stream for the token 1, 2 and 3 before."""
SLOW = np.r_[19:32, 51:64]
"""Those numbers of a head that rotate slowly with position: they compare content."""


def seed_weights(model: Model, seed: int) -> None:
    args = model.args
    assert (args.hidden_size, args.head_dim, args.num_key_value_heads) == (HIDDEN, HEAD, KV_HEADS)
    rng = np.random.default_rng(seed)
    embedding = rng.normal(size=(args.vocab_size, HIDDEN)) * EMBEDDING
    embedding[:, 0] = CONSTANT
    embedding[:, 128:] *= 0.05
    model.model.embed_tokens.weight = mx.array(embedding.astype(np.float32))
    tokens = np.linalg.qr(rng.normal(size=(127, HEAD)))[0].T  # [64, 127]: a token as a head sees it
    before, match = (layer.self_attn for layer in model.model.layers[:2])
    _set(before, _look_back(rng, before, args.rope_theta, tokens))
    _set(match, _induction(rng, match, tokens))


def _small(rng: np.random.Generator, attention: Attention) -> dict[str, Matrix]:
    """Nearly nothing, for q, k, v and o."""
    return {
        name: rng.normal(size=getattr(attention, f"{name}_proj").weight.shape) * 0.001
        for name in "qkvo"
    }


def _set(attention: Attention, weights: dict[str, Matrix]) -> None:
    for name, weight in weights.items():
        getattr(attention, f"{name}_proj").weight = mx.array(weight.astype(np.float32))


def _look_back(
    rng: np.random.Generator, attention: Attention, theta: float, tokens: Matrix
) -> dict[str, Matrix]:
    """Head h attends to the token h + 1 before, whatever it is, and writes it to its slot.

    Keys are the same everywhere, queries the same turned back by h + 1 positions; so after RoPE
    their product is highest at that distance.  The fast frequencies do it.
    """
    w = _small(rng, attention)
    strength = np.zeros(32)
    strength[:8] = SHARPNESS * np.sqrt([1, 1, 1, 0.8, 0.6, 0.4, 0.3, 0.2])
    frequencies = theta ** (-np.arange(32) / 32)
    for kv in range(KV_HEADS):
        at = kv * HEAD
        w["k"][at : at + 32, 0] = strength
        w["v"][at : at + HEAD, 1:128] += tokens
    for head in range(2 * KV_HEADS):
        turned = strength * np.exp(-1j * (head + 1) * frequencies)
        w["q"][head * HEAD : (head + 1) * HEAD, 0] = np.r_[turned.real, turned.imag]
    for head, (slot, width) in enumerate(SLOTS):
        for i in range(width):
            w["o"][slot + i, head * HEAD + i] += EMBEDDING / 1.34
    return w


def _induction(rng: np.random.Generator, attention: Attention, tokens: Matrix) -> dict[str, Matrix]:
    """Attend to where the last three tokens stood just before, and copy the token that is there.

    A key holds a place's three tokens before; a query holds this place's own token and the two
    before it; both through the same random projections, so that equals meet.
    """
    w = _small(rng, attention)
    for kv in range(KV_HEADS):
        views = [rng.normal(size=(len(SLOW), width)) / math.sqrt(width) for _, width in SLOTS]
        key = np.zeros((len(SLOW), HIDDEN))
        for (slot, width), view in zip(SLOTS, views, strict=True):
            key[:, slot : slot + width] = view
        w["k"][kv * HEAD + SLOW] += MATCH * key
        for head, importance in ((2 * kv, (1, 1, 1)), (2 * kv + 1, (1.3, 0.8, 0.4))):
            query = np.zeros((len(SLOW), HIDDEN))
            query[:, 1:128] = importance[0] * views[0] @ tokens[:48]
            query[:, 128:168] = importance[1] * views[1]
            query[:, 176:216] = importance[2] * views[2]
            w["q"][head * HEAD + SLOW] += MATCH * query
        for i in range(kv == 0, HEAD):  # not the constant
            number = kv * HEAD + i
            w["v"][number, number] += 1.0
            for head in (2 * kv, 2 * kv + 1):
                w["o"][number, head * HEAD + i] += COPY * EMBEDDING / 2
    return w
