"""Brings a model into memory: files, weights, tokenizer, and the proof that it runs right.

Knows where models come from: the one that ships with the package, a local folder, or the hub's
cache.  Runs no code of a model's repository.

    prepare   files, digest, tokenizer, sizes: any thread, takes as long as disk and network do
    load      weights layer by layer, then the proof: engine thread, a little at a time; it yields
              between its steps, so that other models may compute, and closing it ends it
"""

import json
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from mlx.nn.layers.base import Module
from mlx_lm.utils import load_config, load_model, load_tokenizer

from agent_memory import builtin
from agent_memory.errors import ModelRefused
from agent_memory.kvcache import attention
from agent_memory.model import footprint, probe, weights
from agent_memory.model.digests import model_digest
from agent_memory.model.probe import Proven
from agent_memory.model.runner import HeadCut, Runner, rows_for_one_rounding
from agent_memory.model.tokenizer import ChatTokenizer
from agent_memory.model_source import BUILTIN, ModelSource, parse
from agent_memory.request import SamplingParams

FILES = ["*.json", "model*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Progress:
    """`step`: files, fingerprint, weights, self-test.  Of the weights `done` of `of` layers."""

    step: str
    done: int = 0
    of: int = 0
    num_bytes: int = 0


Tell = Callable[[Progress], object]
"""Told of progress; it may raise to end the load."""


@dataclass(frozen=True)
class Prepared:
    """What is known of a model whose weights are still on disk."""

    name: str
    path: Path
    digest: str
    tokenizer: ChatTokenizer
    weights_bytes: int
    made_for: int
    context_length: int
    defaults: SamplingParams


@dataclass
class LoadedModel:
    id: str
    model: Module
    tokenizer: ChatTokenizer
    runner: Runner
    proven: Proven
    context_length: int
    defaults: SamplingParams


def prepare(source: ModelSource, tell: Tell, digests: Path | None = None) -> Prepared:
    """`digests`: where those of files are kept.  Raises ModelRefused with what is wrong and what to
    do; OSError where a file cannot be read."""
    tell(Progress("files"))
    path = find(source.source)
    config = _config(path)
    num_bytes = weights.weights_bytes(path)
    tokenizer = ChatTokenizer(load_tokenizer(path, eos_token_ids=config.get("eos_token_id")))
    tell(Progress("fingerprint"))
    digest = model_digest(
        path, digests, lambda so_far: tell(Progress("fingerprint", num_bytes=so_far))
    )
    made_for = context_length(config)
    return Prepared(
        source.name,
        path,
        digest,
        tokenizer,
        num_bytes,
        made_for,
        source.context_length or made_for,
        default_sampling(path),
    )


def load(
    prepared: Prepared, kv_bits: int | None, group_size: int, tell: Tell
) -> Generator[None, None, LoadedModel]:
    """Raises ModelRefused with what is wrong and what to do."""
    model = yield from _weights(prepared.path, tell)
    tell(Progress("self-test"))
    attention.install(model)
    head = HeadCut(model)
    spec = probe.derive_spec(model, prepared.digest, kv_bits, group_size)
    yield
    proven = yield from probe.verify(model, head, spec)
    rows = rows_for_one_rounding(model, spec)
    return LoadedModel(
        prepared.name,
        model,
        prepared.tokenizer,
        Runner(model, spec, head, proven.read, proven.mode, rows),
        proven,
        prepared.context_length,
        prepared.defaults,
    )


def load_whole(source: str, kv_bits: int | None, group_size: int) -> LoadedModel:
    """All of it at once, for those who do nothing else meanwhile."""
    prepared = prepare(parse(source), lambda _: None)
    return finish(load(prepared, kv_bits, group_size, lambda _: None))


def finish(steps: Generator[None, None, T]) -> T:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def find(source: str) -> Path:
    """The folder of a model; from the hub only what is not there yet is fetched."""
    path = builtin.PATH if source == BUILTIN else Path(source).expanduser()
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(source, allow_patterns=FILES, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError, OSError):
        pass  # not in the hub's cache: ask the hub
    try:
        return Path(snapshot_download(source, allow_patterns=FILES))
    except (HfHubHTTPError, ValueError, OSError) as error:
        raise ModelRefused(
            f"There is no model '{source}': no such folder, and the hub did not give it "
            f"({type(error).__name__}). Give --model a folder or a hub id such as "
            "mlx-community/Llama-3.2-3B-Instruct-4bit, or 'builtin'."
        ) from error


def _config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = load_config(path)
    except (ValueError, FileNotFoundError) as error:
        raise _cannot(path, error) from error
    return config


def _weights(path: Path, tell: Tell) -> Generator[None, None, Module]:
    """Evaluated layer by layer, so that others wait for one at most."""
    model: Module
    try:
        model, _ = load_model(path, lazy=True)
    except (ValueError, FileNotFoundError, KeyError, TypeError, RuntimeError) as error:
        raise _cannot(path, error) from error
    if mx.default_device().type == mx.DeviceType.cpu:
        model.set_dtype(mx.float32)  # bfloat16 has no fast kernels on a CPU
    num_bytes, layers = 0, list(model.layers)
    for done, part in enumerate([*layers, model], 1):
        try:
            mx.eval(part.parameters())
        except RuntimeError as error:
            raise _cannot(path, error) from error
        num_bytes = num_bytes + footprint.weights_bytes(part) if part is not model else num_bytes
        tell(Progress("weights", min(done, len(layers)), len(layers), num_bytes))
        yield
    model.eval()
    return model


def _cannot(path: Path, error: Exception) -> ModelRefused:
    return ModelRefused(f"The model in {path} cannot be loaded: {error}")


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
    told = json.loads(file.read_text()) if file.is_file() else {}
    facts = {name: value for name, value in told.items() if value is not None}
    return SamplingParams(
        temperature=float(facts.get("temperature", 1.0)),
        top_p=float(facts.get("top_p") or 1.0),  # 0 would leave no token
        top_k=int(facts.get("top_k", 0)),
        min_p=float(facts.get("min_p", 0.0)),
    )
