"""A sequence's own KV of one layer, growing token by token.

The arrays hold `used` tokens and spare room behind them.  MLX updates a slice in place only while
ours is the sole reference, so a view handed out by `part` must die with the step that asked for it:
one that lives on makes the next append copy the whole tail.  Engine thread only.
"""

from typing import NamedTuple

import mlx.core as mx

from agent_memory.block import BLOCK_TOKENS
from agent_memory.kvcache.packing import Packed


class Part(NamedTuple):
    """Consecutive tokens' K and V from absolute position `start`."""

    start: int
    k: Packed
    v: Packed

    @property
    def end(self) -> int:
        return self.start + int(self.k[0].shape[2])

    def cut(self, lo: int, hi: int) -> "Part":
        """What of this part lies in [lo, hi), as views."""
        lo, hi = max(lo, self.start), min(hi, self.end)
        if (lo, hi) == (self.start, self.end):
            return self
        a, b = lo - self.start, hi - self.start
        return Part(
            lo,
            tuple(x[..., a:b, :] for x in self.k),
            tuple(x[..., a:b, :] for x in self.v),
        )


class Tail:
    def __init__(self, start: int, reserve: int) -> None:
        """`reserve`: tokens the first allocation makes room for, at least."""
        self.start = start
        self.used = 0
        self._reserve = reserve
        self.arrays: list[mx.array] = []
        self._num_k = 0

    def append(self, k: Packed, v: Packed) -> None:
        """k, v: [1, heads, n, width] each."""
        new, n = k + v, int(k[0].shape[2])
        if not self.arrays or self.used + n > self.arrays[0].shape[2]:
            self._grow(new, self.used + n)
        for array, x in zip(self.arrays, new, strict=True):
            array[..., self.used : self.used + n, :] = x
        self._num_k = len(k)
        self.used += n

    def _grow(self, like: Packed, need: int) -> None:
        """Room for `need`, the reserve, or a quarter more than now: few copies, in whole blocks."""
        want = max(need, self._reserve, self.used + self.used // 4)
        room = -(-want // BLOCK_TOKENS) * BLOCK_TOKENS
        grown = [mx.zeros((*x.shape[:2], room, x.shape[-1]), dtype=x.dtype) for x in like]
        for array, old in zip(grown, self.arrays, strict=False):
            array[..., : self.used, :] = old[..., : self.used, :]
        self.arrays = grown

    def part(self) -> Part:
        views = [x[..., : self.used, :] for x in self.arrays]
        return Part(self.start, tuple(views[: self._num_k]), tuple(views[self._num_k :]))

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.arrays)
