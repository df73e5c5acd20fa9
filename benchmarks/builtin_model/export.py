"""A trained model as a directory that mlx_lm loads: weights in bfloat16, config, tokenizer."""

import json
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model
from tokenizers import Tokenizer

from benchmarks.builtin_model import tokenizer as tokens


def export(model: Model, tokenizer: Tokenizer, folder: Path) -> None:
    """Turns the model to bfloat16 on the way."""
    tokens.save(tokenizer, folder)
    ends = {
        "eos_token_id": tokenizer.token_to_id(tokens.TURN_END),
        "pad_token_id": tokenizer.token_to_id(tokens.PAD),
    }
    given = {name: value for name, value in asdict(model.args).items() if value is not None}
    config = given | ends | {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    generation = ends | {"max_new_tokens": 256}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1))
    model.set_dtype(mx.bfloat16)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
