"""A Llama of random float32 weights with the built-in model's tokenizer: real work, no sense.

It never ends its turn, and each of its tokens is a piece of text by itself: the embeddings of all
others, which are its head too, are zero.
"""

import json
import shutil
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tokenizers import Tokenizer

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


def make(folder: Path, **changes: object) -> Path:
    """`changes`: to the config."""
    config = CONFIG | changes
    shutil.copytree(builtin.PATH, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (folder / "config.json").write_text(json.dumps(config))
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    weights = dict(tree_flatten(model.parameters()))
    weights["model.embed_tokens.weight"] *= _is_plain_text(folder)[:, None]
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


def _is_plain_text(folder: Path) -> mx.array:
    """1 for each token of the vocabulary that is letters and digits, perhaps with a space."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pieces = [tokenizer.decode([token]).strip() for token in range(tokenizer.get_vocab_size())]
    return mx.array([piece.isascii() and piece.isalnum() for piece in pieces]).astype(mx.float32)
