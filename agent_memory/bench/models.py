"""The models that a benchmark switches between: those asked for, else two that need no download.

Knows the built-in model's files.  Has MLX compute for a moment, before any server runs.  Main
thread.
"""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from huggingface_hub import hf_hub_download
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tokenizers import Tokenizer

from agent_memory import builtin, model_source
from agent_memory.errors import UsageError

RANDOM: dict[str, object] = {
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


@dataclass(frozen=True, slots=True)
class Model:
    """`source`: what any server is told to load, a folder or a hub id.

    `endless`: never ends its turn, and each of its tokens is a text by itself.
    """

    name: str
    source: str
    endless: bool = False


def chosen(sources: Sequence[str], folder: Path, *, float32: bool) -> list[Model]:
    """Those asked for as `SOURCE` or `NAME=SOURCE`; none: two made in this folder.

    `float32`: of what is made here, as a CPU computes fastest.  Raises ValueError.
    """
    if sources:
        return [Model(m.name, _place(m.source)) for m in map(model_source.parse, sources)]
    own = float32_copy(folder / "builtin") if float32 else builtin.PATH
    dtype = mx.float32 if float32 else mx.bfloat16
    random = random_model(folder / "random", dtype=dtype)
    return [Model("builtin", str(own)), Model("random", str(random), endless=True)]


def check_contexts(models: Iterable[Model], num_tokens: int) -> None:
    """Raises UsageError unless so many tokens fit each."""
    for model in models:
        context = context_tokens(model)
        if context is not None and context < num_tokens:
            raise UsageError(
                f"This needs a context of {num_tokens} tokens, and that of {model.name} is "
                f"{context}. Use another --model, a shorter --mode, or --only with other parts."
            )


def context_tokens(model: Model) -> int | None:
    """What it was made for, as its config says; None if that says nothing."""
    folder, name = Path(model.source), "config.json"
    try:
        file = folder / name if folder.is_dir() else Path(hf_hub_download(model.source, name))
        config = json.loads(file.read_text())
    except (OSError, ValueError):  # its server will say what is wrong
        return None
    found = {**config.get("text_config", {}), **config}.get("max_position_embeddings")
    return found if isinstance(found, int) else None


def _place(source: str) -> str:
    """A folder's whole path; a hub id stays what it is."""
    if source == model_source.BUILTIN:
        return str(builtin.PATH)
    path = Path(source).expanduser()
    return str(path.resolve()) if path.is_dir() else source


def float32_copy(folder: Path) -> Path:
    """Of the built-in model, bfloat16 on disk, for servers that do not turn it themselves."""
    _all_but_code(folder)
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    _save(folder, {name: array.astype(mx.float32) for name, array in weights.items()})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    return folder


def random_model(
    folder: Path, changes: Mapping[str, object] | None = None, dtype: mx.Dtype = mx.float32
) -> Path:
    """A Llama of random weights with the built-in model's tokenizer: real work, no sense.

    It never ends its turn, and each of its tokens is a piece of text by itself: the embeddings of
    all others, which are its head too, are zero.  `changes`: to the config.
    """
    config = {**RANDOM, "torch_dtype": str(dtype).rpartition(".")[2], **(changes or {})}
    _all_but_code(folder)
    (folder / "config.json").write_text(json.dumps(config))
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    weights = dict(tree_flatten(model.parameters()))
    weights["model.embed_tokens.weight"] *= _is_plain_text(folder)[:, None]
    _save(folder, {name: array.astype(dtype) for name, array in weights.items()})
    return folder


def _all_but_code(folder: Path) -> None:
    shutil.copytree(builtin.PATH, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))


def _save(folder: Path, weights: dict[str, mx.array]) -> None:
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})


def _is_plain_text(folder: Path) -> mx.array:
    """1 for each token of the vocabulary that is letters and digits, perhaps with a space."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pieces = [tokenizer.decode([token]).strip() for token in range(tokenizer.get_vocab_size())]
    return mx.array([piece.isascii() and piece.isalnum() for piece in pieces]).astype(mx.float32)
