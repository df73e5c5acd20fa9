"""When two logits are too close for a model's choice to mean anything."""

import mlx.core as mx
from mlx_lm.models.cache import QuantizedKVCache

from agent_memory.model.loader import LoadedModel

SCALES = [1 + n * 1e-6 for n in (1, -1, 2, -2, 3, -3, 4, -4)]
"""Of the embedding.  One alone says little: at 4 bits most change no bucket of a short text, and
then two runs are 5e-5 apart; others change one, and they are up to 0.4 apart."""


def tie_limit(loaded: LoadedModel, tokens: list[int]) -> float:
    """1e-3 unquantized; else how far plain mlx-lm with the same quantization is from itself at most
    when its embedding is scaled by a few parts in a million."""
    form = loaded.proven.spec.groups[0].k
    bits, group_size = form.bits, form.group_size
    if bits is None:
        return 1e-3
    embedding = loaded.model["model"]["embed_tokens"]
    weight = embedding.weight

    def logits(scale: float) -> mx.array:
        embedding.weight = weight * scale
        cache = [QuantizedKVCache(group_size, bits) for _ in loaded.runner.layers]
        result: mx.array = loaded.model(mx.array([tokens]), cache=cache)[0]
        mx.eval(result)
        embedding.weight = weight
        return result

    exact = logits(1.0)
    return max(float(mx.abs(exact - logits(scale)).max()) for scale in SCALES)
