"""What recurrent layers keep of a sequence: arrays of fixed size, replaced by every step.

Knows how they travel through a model in the place of its caches, and how they become payloads and
come back.  Nothing is ever changed in place, so what they were at some token is kept by keeping the
arrays.  Engine thread only.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from agent_memory.kv_spec import KVSpec
from agent_memory.kvcache.packing import DTYPES, RAW, host, typed

States = list[mx.array]
"""[1, *shape] each, in the order of a spec's states."""


def beginning(spec: KVSpec) -> States:
    """Before the first token."""
    return [mx.zeros((1, *form.shape), dtype=DTYPES[form.dtype]) for form in spec.states]


def copy_out(spec: KVSpec, states: States) -> np.ndarray:
    """The payload of a checkpoint: host bytes of their own."""
    whole = [mx.contiguous(array) for array in states]
    mx.eval(whole)
    arrays = dict(zip(_names(spec), whole, strict=True))
    payload = np.empty(spec.state_bytes, np.uint8)
    for slot in spec.state_slots:
        slot.view(payload)[...] = host(arrays[slot.name])[0]
    return payload


def restored(spec: KVSpec, payload: np.ndarray) -> States:
    arrays: dict[str, mx.array] = {}
    for slot in spec.state_slots:
        array = mx.zeros((1, *slot.shape), dtype=RAW[slot.dtype])
        mx.eval(array)
        np.array(array, copy=False)[0] = slot.view(payload)
        arrays[slot.name] = typed(array, slot.dtype)
    return [arrays[name] for name in _names(spec)]


def _names(spec: KVSpec) -> list[str]:
    return [f"{form.layer}.{form.index}" for form in spec.states]


class Carried:
    """Stands where a recurrent layer's cache stands in a model, for one forward of some rows."""

    lengths = None
    left_padding = None

    def __init__(self, arrays: Sequence[mx.array]) -> None:
        """[rows, *shape] each."""
        self.arrays = list(arrays)

    def __getitem__(self, index: int) -> mx.array:
        return self.arrays[index]

    def __setitem__(self, index: int, array: mx.array) -> None:
        self.arrays[index] = array

    def advance(self, num_tokens: int) -> None:
        """Nothing is padded, so nothing moves."""

    def make_mask(self, num_tokens: int) -> None:
        """Every token counts."""
