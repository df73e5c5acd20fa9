"""A sequence's own KV of one layer, growing token by token.

The arrays hold `used` tokens from position `start`, and spare room behind them.  A layer that sees
only the last `window` tokens drops, when its tail grows, those that no row will see again and that
have been copied out.  MLX updates a slice in place only while
ours is the sole reference, so a view handed out by `part` must die with the step that asked for it:
one that lives on makes the next append copy the whole tail.  Engine thread only.
"""

from typing import NamedTuple

import mlx.core as mx

from agent_memory.block import BLOCK_TOKENS, in_blocks
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
    def __init__(self, start: int, reserve: int, window: int | None = None) -> None:
        """`reserve`: tokens the next allocation makes room for, at least."""
        self.start = start
        self.used = 0
        self.window = window
        self.released = start
        """Positions before this have been copied out."""
        self.reserve = reserve if window is None else min(reserve, window + 2 * BLOCK_TOKENS)
        self.arrays: list[mx.array] = []
        self._num_k = 0

    @property
    def end(self) -> int:
        return self.start + self.used

    def begin(self, part: Part) -> None:
        """With a copy of what somebody else has kept."""
        assert not self.used
        self.start = self.released = part.start
        self.append(part.k, part.v)

    def append(self, k: Packed, v: Packed) -> None:
        """k, v: [1, heads, n, width] each."""
        new, n = k + v, int(k[0].shape[2])
        if not self.arrays or self.used + n > self.arrays[0].shape[2]:
            self._grow(new, n)
        for array, x in zip(self.arrays, new, strict=True):
            array[..., self.used : self.used + n, :] = x
        self._num_k = len(k)
        self.used += n

    def _grow(self, like: Packed, more: int) -> None:
        """Room for what was reserved, or else a quarter more than now, in whole blocks."""
        gone = self._num_unseen()
        kept = self.used - gone
        want = self.reserve if self.reserve >= kept + more else kept + kept // 4
        room = in_blocks(max(kept + more, want))
        grown = [mx.zeros((*x.shape[:2], room, x.shape[-1]), dtype=x.dtype) for x in like]
        for array, old in zip(grown, self.arrays, strict=False):
            array[..., :kept, :] = old[..., gone : self.used, :]
        self.arrays, self.start, self.used = grown, self.start + gone, kept

    def _num_unseen(self) -> int:
        """Leading tokens that are of no use any more: the next row sees `window` with itself."""
        if self.window is None:
            return 0
        return max(0, min(self.released, self.end - self.window + 1) - self.start)

    def part(self) -> Part:
        views = [x[..., : self.used, :] for x in self.arrays]
        return Part(self.start, tuple(views[: self._num_k]), tuple(views[self._num_k :]))

    @property
    def room(self) -> int:
        """Tokens there are places for, or will be with the next append."""
        have = int(self.arrays[0].shape[2]) if self.arrays else 0
        return max(have, in_blocks(self.reserve))

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.arrays)
