"""A matched prefix as one contiguous copy, read-only, shared by all sequences that need just it.

A run is filled block by block from payloads, in any order and as they arrive, through numpy views
of evaluated MLX arrays: no second copy in memory, and numpy releases the interpreter while it
copies.  Runs know their tokens only by position.  Engine thread only.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from agent_memory.block import BLOCK_TOKENS
from agent_memory.kv_spec import DType, KVSpec, LayerGroup, payload_bytes
from agent_memory.kvcache import states
from agent_memory.kvcache.packing import RAW, typed
from agent_memory.kvcache.states import States
from agent_memory.kvcache.tail import Part


class Run:
    """`parts[layer]` ends at position `length`; it begins at 0, or where a window's last use is.
    `states`: of recurrent layers, at `length`."""

    def __init__(
        self, length: int, parts: dict[int, Part], nbytes: int, states: Sequence[mx.array] = ()
    ) -> None:
        self.length = length
        self.parts = parts
        self.nbytes = nbytes
        self.states = states


class _Side(NamedTuple):
    """One tensor of one layer of a run, from position `start`."""

    array: mx.array
    view: np.ndarray
    start: int


class RunBuilder:
    """Room for `length` tokens: `grow` it in portions, write every block, then `finish`.

    A model with recurrent layers needs the checkpoint at `length`, too.

    An array per layer and tensor: memory of that size is soon used again, and none is too large for
    a device.
    """

    def __init__(self, spec: KVSpec, length: int) -> None:
        assert length > 0
        self.spec = spec
        self.length = length
        self._wanted = deque(
            (f"{g}.{side}.{name}", i, group, dtype, width)
            for g, group in enumerate(spec.groups)
            for side, form in (("k", group.k), ("v", group.v))
            for name, dtype, width in form.tensors()
            for i in range(len(group.layers))
        )
        self._sides: dict[tuple[str, int], _Side] = {}
        self.nbytes = 0  # so far
        self._states: States = []
        self.whole_bytes = spec.state_bytes + sum(
            payload_bytes((group,), length - first_needed(group, length)) for group in spec.groups
        )

    @property
    def grown(self) -> bool:
        return not self._wanted

    def grow(self, budget_bytes: int) -> int:
        """Allocate, by so much or one array more -> bytes.  Fresh memory is as slow as copying."""
        new: list[tuple[tuple[str, int], mx.array, int]] = []
        nbytes = 0
        while self._wanted and nbytes < budget_bytes:
            name, i, group, dtype, width = self._wanted.popleft()
            start = first_needed(group, self.length)
            array = mx.zeros((1, group.kv_heads, self.length - start, width), dtype=RAW[dtype])
            new.append(((name, i), array, start))
            nbytes += array.nbytes
        mx.eval([array for _, array, _ in new])
        for key, array, start in new:
            self._sides[key] = _Side(array, np.array(array, copy=False)[0], start)
        self.nbytes += nbytes
        return nbytes

    def write(self, start: int, count: int, block_tokens: int, payload: np.ndarray) -> None:
        """The first `count` tokens of a payload of `block_tokens`, to positions from `start`."""
        assert start + count <= self.length and count <= block_tokens
        while not self.grown:
            self.grow(self.spec.payload_bytes(BLOCK_TOKENS))
        for slot in self.spec.slots(block_tokens):
            for i, source in enumerate(slot.view(payload)):
                side = self._sides[slot.name, i]
                skip = max(0, side.start - start)
                if skip < count:
                    at = start + skip - side.start
                    side.view[:, at : at + count - skip] = source[:, skip:count]

    def write_checkpoint(self, payload: np.ndarray) -> None:
        self._states = states.restored(self.spec, payload)
        self.nbytes += payload.nbytes

    def finish(self) -> Run:
        assert len(self._states) == len(self.spec.states)
        parts: dict[int, Part] = {}
        for g, group in enumerate(self.spec.groups):
            start = first_needed(group, self.length)
            for i, layer in enumerate(group.layers):
                k, v = (
                    tuple(self._typed(f"{g}.{side}.{n}", i, t) for n, t, _ in form.tensors())
                    for side, form in (("k", group.k), ("v", group.v))
                )
                parts[layer] = Part(start, k, v)
        self._sides.clear()
        mx.eval([x for part in parts.values() for x in part.k + part.v])
        return Run(self.length, parts, self.nbytes, self._states)

    def _typed(self, name: str, i: int, dtype: DType) -> mx.array:
        return typed(self._sides[name, i].array, dtype)


def first_needed(group: LayerGroup, length: int) -> int:
    """The first of `length` positions that is still read by a row or by copying out a block."""
    if group.window is None:
        return 0
    return max(0, min(length - group.window + 1, length // BLOCK_TOKENS * BLOCK_TOKENS))
