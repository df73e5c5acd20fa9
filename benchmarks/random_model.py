"""A Llama of random float32 weights with the built-in model's tokenizer: real work, no sense."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from agent_memory import builtin

CONFIG: dict[str, object] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 640,
    "num_hidden_layers": 12,
    "intermediate_size": 1792,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "vocab_size": 2048,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 16384,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "torch_dtype": "float32",
}
"""57 million parameters; K and V of a token take 30 KB in float32."""


def make(folder: Path) -> Path:
    shutil.copytree(builtin.PATH, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(CONFIG))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder
