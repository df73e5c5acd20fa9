"""A matched prefix as one contiguous copy, read-only, shared by all sequences that need just it.

A run is filled block by block from payloads, in any order and as they arrive, through numpy views
of evaluated MLX arrays: no second copy in memory, and numpy releases the interpreter while it
copies.  Runs know their tokens only by position.  Engine thread only.
"""

from collections import deque

import mlx.core as mx
import numpy as np

from agent_memory.kv_spec import NUMPY, KVSpec
from agent_memory.kvcache.packing import DTYPES
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
    """Room for `length` tokens: `grow` it in portions, write every block, then `finish`.

    An array per layer and tensor: memory of that size is soon used again, and none is too large for
    a device.
    """

    def __init__(self, spec: KVSpec, length: int) -> None:
        assert length > 0
        self.spec = spec
        self.length = length
        self._slots = spec.slots(length)
        layers = [(slot, layer) for slot in self._slots for layer in range(slot.shape[0])]
        self._wanted = deque(layers)
        self._arrays: dict[tuple[str, int], mx.array] = {}
        self._views: dict[tuple[str, int], np.ndarray] = {}

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self._slots)

    @property
    def grown(self) -> bool:
        return not self._wanted

    def grow(self, budget_bytes: int) -> int:
        """Allocate, by so much or one array more -> bytes.  Fresh memory is as slow as copying."""
        new: list[tuple[str, int]] = []
        nbytes = 0
        while self._wanted and nbytes < budget_bytes:
            slot, layer = self._wanted.popleft()
            array = mx.zeros((1, *slot.shape[1:]), dtype=RAW[slot.dtype])
            self._arrays[slot.name, layer] = array
            new.append((slot.name, layer))
            nbytes += array.nbytes
        mx.eval([self._arrays[key] for key in new])
        self._views |= {key: np.array(self._arrays[key], copy=False) for key in new}
        return nbytes

    def write(self, start: int, count: int, block_tokens: int, payload: np.ndarray) -> None:
        """The first `count` tokens of a payload of `block_tokens`, to positions from `start`."""
        assert start + count <= self.length and count <= block_tokens
        if not self.grown:
            self.grow(self.nbytes)
        for slot in self.spec.slots(block_tokens):
            for layer, source in enumerate(slot.view(payload)):
                self._views[slot.name, layer][0, :, start : start + count] = source[:, :count]

    def finish(self, length: int) -> Run:
        """The run of the first `length` tokens: fewer than planned when a block was missing."""
        assert 0 < length <= self.length
        self._views.clear()
        typed: dict[tuple[str, int], mx.array] = {}
        for slot in self._slots:
            wanted = DTYPES[slot.dtype]
            for layer in range(slot.shape[0]):
                array = self._arrays.pop((slot.name, layer))
                array = array if array.dtype == wanted else array.view(wanted)
                typed[slot.name, layer] = array[..., :length, :]
        parts: dict[int, Part] = {}
        for g, group in enumerate(self.spec.groups):
            for i, layer in enumerate(group.layers):
                k = tuple(typed[f"{g}.k.{name}", i] for name, _, _ in group.k.tensors())
                v = tuple(typed[f"{g}.v.{name}", i] for name, _, _ in group.v.tensors())
                parts[layer] = Part(0, k, v)
        mx.eval(list(typed.values()))
        return Run(length, parts, self.nbytes)


def host(array: mx.array) -> np.ndarray:
    """An evaluated array's bytes as numpy sees them; valid while the array lives."""
    raw = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    view: np.ndarray = np.array(raw, copy=False)
    assert view.dtype in NUMPY.values()
    return view
