"""The forward pass to train through: mlx_lm's llama with the positions given.

Given positions can leave gaps, which is how a short sequence teaches a long context.  The weights,
their names and the function they compute are mlx_lm's own: tests/benchmarks compares the two.
"""

import math
from typing import cast

import mlx.core as mx
from mlx_lm.models.llama import Attention, Model

from benchmarks.builtin_model.cpu_math import cross_entropy, softmax, swiglu


def logits(model: Model, ids: mx.array, positions: mx.array) -> mx.array:
    """ids and positions [B, T] -> [B, T, V].  Embeddings are tied."""
    length, head_dim = ids.shape[1], model.args.head_dim
    assert head_dim is not None and model.args.tie_word_embeddings
    cos, sin = _angles(positions, head_dim, model.args.rope_theta)
    later = mx.arange(length)[:, None] < mx.arange(length)[None]
    mask = mx.where(later, -1e9, 0.0)
    x = model.model.embed_tokens(ids)
    for layer in model.model.layers:
        x = x + _attend(layer.self_attn, layer.input_layernorm(x), cos, sin, mask)
        h = layer.post_attention_layernorm(x)
        x = x + layer.mlp.down_proj(swiglu(layer.mlp.gate_proj(h), layer.mlp.up_proj(h)))
    out: mx.array = model.model.embed_tokens.as_linear(model.model.norm(x))
    return out


def loss(model: Model, ids: mx.array, positions: mx.array, weights: mx.array) -> mx.array:
    """Weighted mean over ids[:, 1:]."""
    predicted = logits(model, ids[:, :-1], positions[:, :-1])
    total, _ = cast(tuple[mx.array, mx.array], cross_entropy(predicted, ids[:, 1:], weights))
    return total / weights.sum()


def _angles(positions: mx.array, head_dim: int, theta: float) -> tuple[mx.array, mx.array]:
    """cos and sin, [B, 1, T, head_dim / 2]."""
    frequencies = mx.exp(mx.arange(0, head_dim, 2) * (-math.log(theta) / head_dim))
    angles = positions[:, None, :, None] * frequencies
    return mx.cos(angles), mx.sin(angles)


def _rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    a, b = mx.split(x, 2, axis=-1)
    return mx.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def _attend(
    layer: Attention, x: mx.array, cos: mx.array, sin: mx.array, mask: mx.array
) -> mx.array:
    batch, length, _ = x.shape
    q, k, v = (
        project(x).reshape(batch, length, heads, -1).transpose(0, 2, 1, 3)
        for project, heads in (
            (layer.q_proj, layer.n_heads),
            (layer.k_proj, layer.n_kv_heads),
            (layer.v_proj, layer.n_kv_heads),
        )
    )
    q, k = _rotate(q, cos, sin) * layer.scale, _rotate(k, cos, sin)
    q = q.reshape(batch, layer.n_kv_heads, -1, length, q.shape[-1])
    scores = q @ k[:, :, None].swapaxes(-1, -2) + mask
    out = softmax(scores) @ v[:, :, None]
    out = out.reshape(batch, layer.n_heads, length, -1).transpose(0, 2, 1, 3)
    projected: mx.array = layer.o_proj(out.reshape(batch, length, -1))
    return projected
