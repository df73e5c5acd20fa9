"""What a model's files say of it before anybody loads it: context, weights, memory per token.

Knows config.json's usual words.  Reads headers' sizes only, never weights.  Main thread.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub

from agent_memory import builtin
from agent_memory.config import Config

SCALES_BYTES = 4
"""A scale and a bias for each group."""
PLAIN_BYTES = 2


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """`token_bytes`: of KV, at most: layers with a window or with none at all keep less; None where
    the config does not say."""

    path: Path
    context: int | None
    weights_bytes: int
    token_bytes: int | None


def find(model: str) -> Path | None:
    """Its folder, if it is on this machine."""
    path = builtin.PATH if model == "builtin" else Path(model).expanduser()
    if path.is_dir():
        return path
    try:
        cached = huggingface_hub.try_to_load_from_cache(model, "config.json")
    except ValueError:  # no name the hub would know
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def read(path: Path, settings: Config) -> ModelFacts:
    """Raises OSError, ValueError."""
    config = json.loads((path / "config.json").read_text("utf-8"))
    if not isinstance(config, dict):
        raise ValueError("config.json is no object")
    nested = config.get("text_config")
    facts = {**(nested if isinstance(nested, dict) else {}), **config}
    weights = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    context = _whole(facts, "max_position_embeddings")
    return ModelFacts(path, context, weights, _token_bytes(facts, settings))


def _token_bytes(facts: dict[str, Any], settings: Config) -> int | None:
    heads, layers = _whole(facts, "num_attention_heads"), _whole(facts, "num_hidden_layers")
    hidden = _whole(facts, "hidden_size")
    if not (heads and layers and hidden):
        return None
    kv_heads = _whole(facts, "num_key_value_heads") or heads
    dim = _whole(facts, "head_dim") or hidden // heads
    bits, group = settings.kv_bits, settings.kv_group_size
    per_number = bits / 8 + SCALES_BYTES / group if bits and dim % group == 0 else PLAIN_BYTES
    return round(2 * layers * kv_heads * dim * per_number)


def _whole(facts: dict[str, Any], name: str) -> int | None:
    value = facts.get(name)
    return value if type(value) is int and value > 0 else None
