"""Specs of small caches and random K and V for them, appended as a step would."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from agent_memory.kv_spec import KVSpec, LayerGroup
from agent_memory.kvcache.packing import DTYPES, choose_format, pack
from agent_memory.kvcache.run import Run, RunBuilder
from agent_memory.kvcache.sequence_kv import SequenceKV

Payload = npt.NDArray[np.uint8]
BITS = [None, 8, 4]


def small_spec(bits: int | None, dtype: mx.Dtype = mx.float32) -> KVSpec:
    """Two groups of different head_dim, their layers alternating; the second fits no group."""
    wide, odd = (choose_format(dim, dtype, bits, 32) for dim in (64, 48))
    groups = (LayerGroup("full", (0, 2), 2, wide, wide), LayerGroup("full", (1,), 1, odd, wide))
    return KVSpec(groups, "small")


def append(kv: SequenceKV, count: int, seed: int) -> None:
    """The K and V of position p depend on `seed` and p alone, however they come."""
    for group in kv.spec.groups:
        for layer in group.layers:
            sides = []
            for side, form in enumerate((group.k, group.v)):
                rows = [
                    mx.random.normal(
                        (1, group.kv_heads, 1, form.dim),
                        key=mx.random.key(((seed * 4 + layer) * 2 + side) * 4096 + p),
                    )
                    for p in range(kv.length, kv.length + count)
                ]
                x = mx.concatenate(rows, axis=2).astype(DTYPES[form.dtype])
                sides.append(pack(x, form))
            kv.tails[layer].append(*sides)
    kv.length += count
    mx.eval([tail.part() for tail in kv.tails.values()])


def run_of(spec: KVSpec, spans: Sequence[tuple[int, int, int, Payload]], length: int) -> Run:
    """spans: what `RunBuilder.write` takes."""
    builder = RunBuilder(spec, length)
    for span in spans:
        builder.write(*span)
    return builder.finish()
