"""Finds out how a freshly loaded model keeps its KV, and proves that we compute as it does.

`derive_spec` sees the shapes of K and V in one small forward.  `verify` compares our way of running
the model (rows, tails, our attention) with mlx-lm's own, on rows at different positions and on a
chunk.  What cannot be proven is refused with the reason.  Engine thread only; what takes several
forwards yields between them, so that others may compute.
"""

from collections.abc import Generator
from dataclasses import dataclass

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import make_prompt_cache

from agent_memory.errors import ModelRefused
from agent_memory.kv_spec import KVSpec, LayerGroup, StateFormat, TensorFormat
from agent_memory.kvcache import states
from agent_memory.kvcache.attention import Member, Read, Rows
from agent_memory.kvcache.packing import DTYPES, choose_format, dtype_name, pack
from agent_memory.kvcache.run import Run, RunBuilder
from agent_memory.kvcache.sequence_kv import SequenceKV
from agent_memory.model import caches
from agent_memory.model.runner import HeadCut, Job, Mode, Runner

TOLERANCE: dict[mx.Dtype, float] = {mx.float32: 1e-3, mx.float16: 3e-2, mx.bfloat16: 1e-1}
"""Largest accepted difference of logits, relative to the largest logit, by the model's type."""
RUN_TOKENS, TAIL_TOKENS = 300, 7
MAX_WINDOW = 1100
"""Windows up to this are filled and overrun by the proof; longer ones would take too long."""
READS: tuple[Read, Read] = ("packed", "dense")


@dataclass(frozen=True)
class Proven:
    """`read`: how decode rows read packed KV, where the runner's mode leaves that to us."""

    spec: KVSpec
    read: Read
    vocab_size: int
    worst_difference: float
    mode: Mode


class _Recorder:
    """Stands where a layer's cache stands, for one forward, and sees the shapes that pass."""

    offset = 0

    def __init__(self) -> None:
        self.kv_heads = self.k_dim = self.v_dim = 0
        self.dtype = mx.float32

    def make_mask(
        self, num_tokens: int, *, return_array: bool = False, **_: object
    ) -> mx.array | str:
        return mx.tri(num_tokens, dtype=mx.bool_) if return_array else "causal"

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        _, self.kv_heads, _, self.k_dim = keys.shape
        self.v_dim, self.dtype = values.shape[-1], keys.dtype
        return keys, values


def derive_spec(model: Module, digest: str, bits: int | None, group_size: int) -> KVSpec:
    leaves = caches.flat(model)
    recorders = {n: _Recorder() for n, leaf in enumerate(leaves) if not caches.is_recurrent(leaf)}
    windows = {n: caches.window(leaves[n]) for n in recorders}
    seen = caches.nested(
        [recorders.get(n, leaf) for n, leaf in enumerate(leaves)], caches.counts(model)
    )
    try:
        mx.eval(model(mx.array([[0, 0]]), cache=seen))
    except Exception as error:  # whatever a model does with a cache that only looks on
        raise _own_ways(error) from error
    if not recorders or not all(r.k_dim and r.v_dim for r in recorders.values()):
        raise ModelRefused(
            "Some layers of the model keep no K and V of their own, or none does. Choose a model "
            "with attention."
        )
    rank = getattr(getattr(model, "args", None), "kv_lora_rank", None)
    shapes: dict[tuple[int | None, int, int, int, mx.Dtype], list[int]] = {}
    for layer, r in recorders.items():
        shapes.setdefault((windows[layer], r.kv_heads, r.k_dim, r.v_dim, r.dtype), []).append(layer)
    groups = [
        LayerGroup(
            "window" if window else "latent" if (kv_heads, k_dim) == (1, rank) else "full",
            tuple(layers),
            kv_heads,
            choose_format(k_dim, dtype, bits, group_size),
            choose_format(v_dim, dtype, bits, group_size),
            window,
        )
        for (window, kv_heads, k_dim, v_dim, dtype), layers in shapes.items()
    ]
    return KVSpec(tuple(groups), digest, _states(leaves))


def _states(leaves: list[object]) -> tuple[StateFormat, ...]:
    """Of caches that a model has written to."""
    return tuple(
        StateFormat(layer, index, array.shape[1:], dtype_name(array.dtype))
        for layer, leaf in enumerate(leaves)
        for index, array in enumerate(caches.arrays(leaf))
    )


def verify(model: Module, head: HeadCut, spec: KVSpec) -> Generator[None, None, Proven]:
    """Raises ModelRefused where our numbers are not the model's."""
    width = int(model(mx.array([[0]]), cache=make_prompt_cache(model)).shape[-1])
    first = 9 + max(
        (g.window or 0 for g in spec.groups if (g.window or 0) <= MAX_WINDOW), default=0
    )
    texts = [[(7 * i + 3 * s) % min(width, 997) for i in range(first + 15)] for s in range(2)]
    plain = []
    for text in texts:
        plain.append(_plain(model, text))
        yield
    dtype = DTYPES[spec.groups[0].k.dtype]
    limit = TOLERANCE[dtype] * max(1.0, *(float(mx.abs(p).max()) for p in plain))
    unquantized = derive_spec(model, spec.model_digest, None, 0)
    mode: Mode = "split" if spec.states else "mixed"
    try:
        ours = yield from _ours(Runner(model, unquantized, head, "packed", mode), texts, first)
    except ModelRefused:
        raise
    except Exception:  # whatever a model does with K and V it cannot read
        ours = yield from _handed(model, unquantized, head, texts, first)
        mode = "handed"
    worst = _difference(ours, plain)
    if not worst <= limit:
        raise ModelRefused(
            f"Computed our way the model's logits differ by {worst:.3g} from its own "
            f"(at most {limit:.3g} is rounding). It does something with its KV that is not known. "
            "Choose another model."
        )
    return Proven(spec, _choose_read(spec), width, worst, mode)


Logits = list[dict[int, mx.array]]
Computing = Generator[None, None, Logits]


def _handed(
    model: Module, spec: KVSpec, head: HeadCut, texts: list[list[int]], first: int
) -> Computing:
    try:
        return (yield from _ours(Runner(model, spec, head, "packed", "handed"), texts, first))
    except ModelRefused:
        raise
    except Exception as error:
        raise _own_ways(error) from error


def _own_ways(error: Exception) -> ModelRefused:
    return ModelRefused(
        "The model handles K and V in its own way instead of leaving them to attention "
        f"({type(error).__name__}: {error}). Choose a model with ordinary attention, such as "
        "those of the Llama, Qwen or Mistral families."
    )


def _choose_read(spec: KVSpec) -> Read:
    """Packed wherever it is right: CUDA kernels are known to misread sliced packed KV.

    Compared over the same KV, a run and a tail with room to spare: whole forwards would not do,
    for in those a last bit now and then moves a number into the next bucket.
    """
    if mx.cuda.is_available():
        return "dense"
    kv = SequenceKV(spec)
    _fill(kv, RUN_TOKENS)
    kv = SequenceKV(spec, _restored(kv), RUN_TOKENS)
    _fill(kv, TAIL_TOKENS)
    same = all(_reads_alike(kv, group) for group in spec.groups)
    return "packed" if same else "dense"


def _fill(kv: SequenceKV, count: int) -> None:
    """Random K and V for `count` more tokens."""
    for group in kv.spec.groups:
        for layer in group.layers:
            k, v = (_random(layer, (group.kv_heads, count, f.dim), f) for f in (group.k, group.v))
            kv.tails[layer].append(pack(k, group.k), pack(v, group.v))
    kv.length += count


def _random(seed: int, shape: tuple[int, ...], form: TensorFormat) -> mx.array:
    return mx.random.normal((1, *shape), DTYPES[form.dtype], key=mx.random.key(seed))


def _reads_alike(kv: SequenceKV, group: LayerGroup) -> bool:
    layer, dim = group.layers[0], group.k.dim
    q = _random(layer, (2 * group.kv_heads, 1, dim), group.k)
    packed, dense = (
        Rows(layer, group, [Member(kv, 1, 1)], mx.array([kv.length]), read).attend(q, dim**-0.5)
        for read in READS
    )
    limit = TOLERANCE[q.dtype] * max(1.0, float(mx.abs(dense).max()))
    return bool(float(mx.abs(packed - dense).max()) <= limit)


def _plain(model: Module, text: list[int]) -> mx.array:
    """mlx-lm's logits at every position [tokens, vocab]."""
    out: mx.array = model(mx.array([text]), cache=make_prompt_cache(model))
    logits = out[0].astype(mx.float32)
    mx.eval(logits)
    return logits


def _ours(runner: Runner, texts: list[list[int]], first: int) -> Computing:
    """Logits by position of two sequences, through every road there is.

    One starts with a chunk of `first` rows, is copied out and goes on from a run; the other joins
    later; then both decode together and beside each other's chunks.
    """
    kvs = [SequenceKV(runner.spec), SequenceKV(runner.spec)]
    out: Logits = [{}, {}]
    for counts in ((first, 0), (1, 5), (1, 1), (4, 1), (1, 1), (1, 7)):
        who = sorted((i for i in range(2) if counts[i]), key=lambda i: counts[i])
        spans = [texts[i][kvs[i].length : kvs[i].length + counts[i]] for i in who]
        jobs = [Job(kvs[i], span) for i, span in zip(who, spans, strict=True)]
        logits = runner.forward(jobs).astype(mx.float32)
        mx.eval(logits)
        for row, i in enumerate(who):
            out[i][kvs[i].length - 1] = logits[row]
        if counts[1] == 0:
            kvs[0] = SequenceKV(runner.spec, _restored(kvs[0]))
        yield
    return out


def _restored(kv: SequenceKV) -> Run:
    builder = RunBuilder(kv.spec, kv.length)
    builder.write(0, kv.length, kv.length, kv.copy_out(0, kv.length))
    builder.write_checkpoint(states.copy_out(kv.spec, kv.states))
    return builder.finish()


def _difference(ours: Logits, plain: list[mx.array]) -> float:
    return max(
        float(mx.abs(row - plain[i][position]).max())
        for i, rows in enumerate(ours)
        for position, row in rows.items()
    )
