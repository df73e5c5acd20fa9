"""Which caches mlx-lm makes for a model, as a flat list: its layers may have several each.

The one place that knows mlx-lm's classes of caches and what is kept of each.  Engine thread only.
"""

from collections.abc import Sequence
from typing import TypeVar

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from agent_memory.errors import ModelRefused

Leaf = TypeVar("Leaf")


def flat(model: Module) -> list[object]:
    return [leaf for cache in make_prompt_cache(model) for leaf in _leaves(cache)]


def counts(model: Module) -> list[int]:
    """Of each entry in the model's list of caches: how many it holds, 0 if it is one itself."""
    caches = make_prompt_cache(model)
    return [len(cache.caches) if isinstance(cache, CacheList) else 0 for cache in caches]


def nested(leaves: Sequence[Leaf], counts: Sequence[int]) -> list[Leaf | tuple[Leaf, ...]]:
    """What stands for the flat list, in the form that the model expects."""
    rest, whole = iter(leaves), list[Leaf | tuple[Leaf, ...]]()
    for count in counts:
        whole.append(tuple(next(rest) for _ in range(count)) if count else next(rest))
    return whole


def _leaves(cache: object) -> list[object]:
    return list(cache.caches) if isinstance(cache, CacheList) else [cache]


def is_recurrent(cache: object) -> bool:
    return type(cache) is ArraysCache


def arrays(cache: object) -> list[mx.array]:
    """What a model has put into a recurrent layer's cache; nothing of other layers'."""
    kept: Sequence[mx.array | None] = cache.cache if isinstance(cache, ArraysCache) else []
    return [array for array in kept if array is not None]


def window(cache: object) -> int | None:
    """None: all tokens are seen.  Raises ModelRefused for what is neither that nor a window."""
    if type(cache) is KVCache:
        return None
    if type(cache) is RotatingKVCache and cache.keep == 0:
        return int(cache.max_size)
    raise ModelRefused(
        f"The model keeps {type(cache).__name__}, which cannot be remembered exactly so far. "
        "Choose a model with attention, full or over a window, or with recurrent layers beside "
        "it, such as Llama 3, Qwen 3 or Gemma 3."
    )
