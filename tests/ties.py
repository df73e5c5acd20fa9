"""When two logits are too close for a model's choice to mean anything."""

import mlx.core as mx
from mlx_lm.models.cache import QuantizedKVCache

from agent_memory.model.loader import LoadedModel


def tie_limit(loaded: LoadedModel, tokens: list[int]) -> float:
    """1e-3 unquantized; else how far plain mlx-lm with the same quantization is from itself after
    scaling the embedding by 1 + 1e-6."""
    form = loaded.proven.spec.groups[0].k
    if form.bits is None:
        return 1e-3
    embedding = loaded.model["model"]["embed_tokens"]
    weight, logits = embedding.weight, []
    for scale in (1.0, 1.0 + 1e-6):
        embedding.weight = weight * scale
        cache = [QuantizedKVCache(form.group_size, form.bits) for _ in loaded.runner.layers]
        logits.append(loaded.model(mx.array([tokens]), cache=cache)[0])
        mx.eval(logits[-1])
    embedding.weight = weight
    return float(mx.abs(logits[0] - logits[1]).max())
