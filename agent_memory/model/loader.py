"""Brings a model into memory: files, weights, tokenizer, and the proof that it runs right.

Knows where models come from: the one that ships with the package, a local folder, or the hub's
cache.  Runs no code of a model's repository.  Engine thread only.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from mlx.nn.layers.base import Module
from mlx_lm.utils import load_model, load_tokenizer

from agent_memory import builtin
from agent_memory.errors import ModelRefused
from agent_memory.kvcache import attention
from agent_memory.model import probe
from agent_memory.model.digests import model_digest
from agent_memory.model.probe import Proven
from agent_memory.model.runner import HeadCut, Runner, rows_for_one_rounding
from agent_memory.model.tokenizer import ChatTokenizer
from agent_memory.request import SamplingParams

BUILTIN = "builtin"
FILES = ["*.json", "model*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")

Progress = Callable[[str], None]


@dataclass
class LoadedModel:
    id: str
    model: Module
    tokenizer: ChatTokenizer
    runner: Runner
    proven: Proven
    context_length: int
    defaults: SamplingParams


def load(
    model_id: str,
    kv_bits: int | None,
    group_size: int,
    progress: Progress,
    digests: Path | None = None,
) -> LoadedModel:
    """`digests`: where those of files are kept.  Raises ModelRefused with what is wrong and what to
    do."""
    progress("files")
    path = find(model_id)
    progress("weights")
    model, config = _weights(path)
    tokenizer = ChatTokenizer(load_tokenizer(path, eos_token_ids=config.get("eos_token_id")))
    progress("fingerprint")
    digest = model_digest(path, digests)
    progress("self-test")
    attention.install(model)
    head = HeadCut(model)
    spec = probe.derive_spec(model, digest, kv_bits, group_size)
    proven = probe.verify(model, head, spec)
    return LoadedModel(
        id=model_id,
        model=model,
        tokenizer=tokenizer,
        runner=Runner(
            model, spec, head, proven.read, proven.mode, rows_for_one_rounding(model, spec)
        ),
        proven=proven,
        context_length=context_length(config),
        defaults=default_sampling(path),
    )


def find(model_id: str) -> Path:
    """The folder of a model; from the hub only what is not there yet is fetched."""
    path = builtin.PATH if model_id == BUILTIN else Path(model_id).expanduser()
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(model_id, allow_patterns=FILES, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError, OSError):
        pass  # not in the hub's cache: ask the hub
    try:
        return Path(snapshot_download(model_id, allow_patterns=FILES))
    except (HfHubHTTPError, ValueError, OSError) as error:
        raise ModelRefused(
            f"There is no model '{model_id}': no such folder, and the hub did not give it "
            f"({type(error).__name__}). Give --model a folder or a hub id such as "
            "mlx-community/Llama-3.2-3B-Instruct-4bit, or 'builtin'."
        ) from error


def _weights(path: Path) -> tuple[Module, dict[str, Any]]:
    try:
        model, config = load_model(path, lazy=True)
    except (ValueError, FileNotFoundError, KeyError, TypeError, RuntimeError) as error:
        raise ModelRefused(f"The model in {path.name} cannot be loaded: {error}") from error
    if mx.default_device().type == mx.DeviceType.cpu:
        model.set_dtype(mx.float32)  # bfloat16 has no fast kernels on a CPU
    mx.eval(model.parameters())
    model.eval()
    return model, config


def context_length(config: dict[str, Any]) -> int:
    """Tokens the model was made for; 4096 where its config does not say."""
    for facts in (config, config.get("text_config") or {}):
        for key in CONTEXT_KEYS:
            if isinstance(facts.get(key), int):
                return int(facts[key])
    return 4096


def default_sampling(path: Path) -> SamplingParams:
    """What the model's makers recommend, for requests that do not say."""
    file = path / "generation_config.json"
    facts = json.loads(file.read_text()) if file.is_file() else {}
    return SamplingParams(
        temperature=float(facts.get("temperature") or 1.0),
        top_p=float(facts.get("top_p") or 1.0),
        top_k=int(facts.get("top_k") or 0),
        min_p=float(facts.get("min_p") or 0.0),
    )
