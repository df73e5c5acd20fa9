"""Finds out how a freshly loaded model keeps its KV, and proves that we compute as it does.

`derive_spec` sees the shapes of K and V in one small forward.  `verify` compares our way of running
the model (rows, tails, our attention) with mlx-lm's own, on rows at different positions and on a
chunk.  What cannot be proven is refused with the reason.  Engine thread only.
"""

from dataclasses import dataclass

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import KVCache, make_prompt_cache

from agent_memory.errors import ModelRefused
from agent_memory.kv_spec import KVSpec, LayerGroup
from agent_memory.kvcache.attention import Read
from agent_memory.kvcache.packing import DTYPES, choose_format
from agent_memory.kvcache.run import Run, RunBuilder
from agent_memory.kvcache.sequence_kv import SequenceKV
from agent_memory.model.runner import HeadCut, Job, Runner

TOLERANCE: dict[mx.Dtype, float] = {mx.float32: 1e-3, mx.float16: 3e-2, mx.bfloat16: 1e-1}
"""Largest accepted difference of logits, relative to the largest logit, by the model's type."""


@dataclass(frozen=True)
class Proven:
    """`read`: how decode rows read packed KV.  `mode` "mixed": all rows of a step at once."""

    spec: KVSpec
    read: Read
    vocab_size: int
    worst_difference: float
    mode: str = "mixed"


class _Recorder:
    """Stands where a layer's cache stands, for one forward, and sees the shapes that pass."""

    offset = 0

    def __init__(self) -> None:
        self.kv_heads = self.k_dim = self.v_dim = 0
        self.dtype = mx.float32

    def make_mask(self, *_args: object, **_kwargs: object) -> str:
        return "causal"

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        _, self.kv_heads, _, self.k_dim = keys.shape
        self.v_dim, self.dtype = values.shape[-1], keys.dtype
        return keys, values


def derive_spec(model: Module, digest: str, bits: int | None, group_size: int) -> KVSpec:
    kinds = {type(cache).__name__ for cache in make_prompt_cache(model)} - {KVCache.__name__}
    if kinds:
        raise ModelRefused(
            f"The model keeps {', '.join(sorted(kinds))}; so far only models with plain full "
            "attention in every layer can be remembered exactly. Choose one of those, such as "
            "Llama 3 or Qwen 3."
        )
    seen = [_Recorder() for _ in make_prompt_cache(model)]
    try:
        mx.eval(model(mx.array([[0, 0]]), cache=seen))
    except Exception as error:  # whatever a model does with a cache that only looks on
        raise _own_ways(error) from error
    if not all(r.k_dim and r.v_dim for r in seen):
        raise ModelRefused("Some layers of the model keep no K and V of their own.")
    shapes: dict[tuple[int, int, int, mx.Dtype], list[int]] = {}
    for layer, r in enumerate(seen):
        shapes.setdefault((r.kv_heads, r.k_dim, r.v_dim, r.dtype), []).append(layer)
    groups = [
        LayerGroup(
            "full",
            tuple(layers),
            kv_heads,
            choose_format(k_dim, dtype, bits, group_size),
            choose_format(v_dim, dtype, bits, group_size),
        )
        for (kv_heads, k_dim, v_dim, dtype), layers in shapes.items()
    ]
    return KVSpec(tuple(groups), digest)


def verify(model: Module, head: HeadCut, spec: KVSpec) -> Proven:
    """Raises ModelRefused where our numbers are not the model's."""
    width = int(model(mx.array([[0]]), cache=make_prompt_cache(model)).shape[-1])
    texts = [[(7 * i + 3 * s) % min(width, 997) for i in range(24)] for s in range(2)]
    plain = [_plain(model, text) for text in texts]
    unquantized = derive_spec(model, spec.model_digest, None, 0)
    try:
        ours = _ours(Runner(model, unquantized, head, "packed"), texts)
    except ModelRefused:
        raise
    except Exception as error:  # whatever a model does with K and V it cannot read
        raise _own_ways(error) from error
    worst = _difference(ours, plain)
    dtype = DTYPES[spec.groups[0].k.dtype]
    limit = TOLERANCE[dtype] * max(1.0, *(float(mx.abs(p).max()) for p in plain))
    if not worst <= limit:
        raise ModelRefused(
            f"Computed our way the model's logits differ by {worst:.3g} from its own "
            f"(at most {limit:.3g} is rounding). It does something with its KV that is not known. "
            "Choose another model."
        )
    return Proven(spec, _choose_read(model, head, spec, texts, limit), width, worst)


def _own_ways(error: Exception) -> ModelRefused:
    return ModelRefused(
        "The model handles K and V in its own way instead of leaving them to attention "
        f"({type(error).__name__}: {error}). Choose a model with ordinary attention, such as "
        "those of the Llama, Qwen or Mistral families."
    )


def _choose_read(
    model: Module, head: HeadCut, spec: KVSpec, texts: list[list[int]], limit: float
) -> Read:
    """Packed wherever it is right: CUDA kernels are known to misread sliced packed KV."""
    if mx.cuda.is_available():
        return "dense"
    packed, dense = (_ours(Runner(model, spec, head, read), texts) for read in ("packed", "dense"))
    same = all(
        float(mx.abs(row - dense[i][position]).max()) <= limit
        for i, rows in enumerate(packed)
        for position, row in rows.items()
    )
    return "packed" if same else "dense"


def _plain(model: Module, text: list[int]) -> mx.array:
    """mlx-lm's logits at every position [tokens, vocab]."""
    out: mx.array = model(mx.array([text]), cache=make_prompt_cache(model))
    return out[0].astype(mx.float32)


def _ours(runner: Runner, texts: list[list[int]]) -> list[dict[int, mx.array]]:
    """Logits by position of two sequences, through every road there is.

    The first starts with a chunk, is copied out and goes on from a run; the second joins later;
    then both decode together and beside each other's chunks.
    """
    kvs = [SequenceKV(runner.spec), SequenceKV(runner.spec)]
    out: list[dict[int, mx.array]] = [{}, {}]
    for counts in ((9, 0), (1, 5), (1, 1), (4, 1), (1, 1), (1, 7)):
        who = sorted((i for i in range(2) if counts[i]), key=lambda i: counts[i])
        spans = [texts[i][kvs[i].length : kvs[i].length + counts[i]] for i in who]
        jobs = [Job(kvs[i], span) for i, span in zip(who, spans, strict=True)]
        logits = runner.forward(jobs).astype(mx.float32)
        mx.eval(logits)
        for row, i in enumerate(who):
            out[i][kvs[i].length - 1] = logits[row]
        if counts[1] == 0:
            kvs[0] = SequenceKV(runner.spec, _restored(kvs[0]))
    return out


def _restored(kv: SequenceKV) -> Run:
    builder = RunBuilder(kv.spec, kv.length)
    builder.write(0, kv.length, kv.length, kv.copy_out(0, kv.length))
    return builder.finish(kv.length)


def _difference(ours: list[dict[int, mx.array]], plain: list[mx.array]) -> float:
    return max(
        float(mx.abs(row - plain[i][position]).max())
        for i, rows in enumerate(ours)
        for position, row in rows.items()
    )
