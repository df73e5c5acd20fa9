"""A matched prefix as one contiguous copy, read-only, shared by all sequences that need just it.

A run is filled block by block from payloads, in any order and as they arrive, through numpy views
of evaluated MLX arrays: no second copy in memory, and numpy releases the interpreter while it
copies.  Runs know their tokens only by position.  Engine thread only.
"""

import mlx.core as mx
import numpy as np

from agent_memory.kv_spec import NUMPY, KVSpec, TensorSlot
from agent_memory.kvcache.packing import DTYPES, Packed
from agent_memory.kvcache.tail import Part

RAW: dict[str, mx.Dtype] = {
    "U32": mx.uint32,
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.uint16,  # filled as bit patterns, viewed as bfloat16 when done
}


class Run:
    """`parts[layer]` holds positions 0 to `length`."""

    def __init__(self, length: int, parts: dict[int, Part], nbytes: int) -> None:
        self.length = length
        self.parts = parts
        self.nbytes = nbytes


class RunBuilder:
    """Room for `length` tokens; write every block, then `finish`."""

    def __init__(self, spec: KVSpec, length: int) -> None:
        assert length > 0
        self.spec = spec
        self.length = length
        self._slots = spec.slots(length)
        self._arrays = [mx.zeros(s.shape, dtype=RAW[s.dtype]) for s in self._slots]
        mx.eval(self._arrays)
        self._views = [np.array(a, copy=False) for a in self._arrays]

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self._slots)

    def write(self, start: int, count: int, block_tokens: int, payload: np.ndarray) -> None:
        """The first `count` tokens of a payload of `block_tokens`, to positions from `start`."""
        assert start + count <= self.length and count <= block_tokens
        for view, source in zip(self._views, self.spec.slots(block_tokens), strict=True):
            view[:, :, start : start + count] = source.view(payload)[:, :, :count]

    def finish(self, length: int) -> Run:
        """The run of the first `length` tokens: fewer than planned when a block was missing."""
        assert 0 < length <= self.length
        del self._views
        by_name = {
            s.name: self._typed(s, a) for s, a in zip(self._slots, self._arrays, strict=True)
        }
        parts: dict[int, Part] = {}
        for g, group in enumerate(self.spec.groups):
            k = [by_name[f"{g}.k.{name}"] for name, _, _ in group.k.tensors()]
            v = [by_name[f"{g}.v.{name}"] for name, _, _ in group.v.tensors()]
            for i, layer in enumerate(group.layers):
                parts[layer] = Part(0, _layer(k, i, length), _layer(v, i, length))
        mx.eval([x for p in parts.values() for x in p.k + p.v])
        return Run(length, parts, self.nbytes)

    @staticmethod
    def _typed(slot: TensorSlot, array: mx.array) -> mx.array:
        wanted = DTYPES[slot.dtype]
        return array if array.dtype == wanted else array.view(wanted)


def _layer(arrays: list[mx.array], i: int, length: int) -> Packed:
    """A slice along the leading axis is contiguous and costs nothing."""
    return tuple(a[i : i + 1, :, :length] for a in arrays)


def host(array: mx.array) -> np.ndarray:
    """An evaluated array's bytes as numpy sees them; valid while the array lives."""
    raw = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    view: np.ndarray = np.array(raw, copy=False)
    assert view.dtype in NUMPY.values()
    return view
