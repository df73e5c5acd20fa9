"""Dense K and V for models that work on them themselves, such as those with latent attention.

What is kept is the same as everywhere: packed, in runs and tails.  Only reading differs: the model
gets arrays, padded on the right to the longest sequence, and a mask.  Engine thread only.

    decode   keys [sequences, heads, longest, dim], mask [sequences, 1, 1, longest]
    a chunk  keys [1, heads, tokens so far, dim],   mask [rows, tokens so far] or "causal"
"""

from typing import Literal

import mlx.core as mx

from agent_memory.errors import ModelRefused
from agent_memory.kvcache.attention import Rows
from agent_memory.kvcache.packing import dense
from agent_memory.kvcache.sequence_kv import joined


class Handed(Rows):
    """`members` are decode rows, or one chunk."""

    def make_mask(
        self,
        num_tokens: int,
        *,
        return_array: bool = False,
        window_size: int | None = None,
        **_: object,
    ) -> mx.array | Literal["causal"] | None:
        if window_size is not None or self.group.window is not None:
            raise ModelRefused(
                "The model works on K and V itself and sees only a window of them, which is not "
                "supported yet. Choose a model with ordinary attention."
            )
        lengths = [kv.length for kv, _, _ in self.members]
        if num_tokens > 1:
            own = mx.arange(lengths[0] - num_tokens, lengths[0])[:, None]
            return mx.arange(lengths[0]) <= own if return_array else "causal"
        if len(set(lengths)) == 1:
            return None
        return mx.arange(max(lengths)) < mx.array(lengths)[:, None, None, None]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """keys, values: [sequences, heads, 1, dim] or [1, heads, tokens, dim]."""
        super().update_and_fetch(keys, values)
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        longest = max(kv.length for kv, _, _ in self.members)
        parts = [kv.parts(self.layer) for kv, _, _ in self.members]
        k = [joined([dense(part.k, self.group.k) for part in own]) for own in parts]
        v = [joined([dense(part.v, self.group.v) for part in own]) for own in parts]
        return _padded(k, longest), _padded(v, longest)


def _padded(arrays: list[mx.array], length: int) -> mx.array:
    """[1, heads, tokens, dim] each -> [len(arrays), heads, length, dim]."""
    room = [[(0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)] for x in arrays]
    return mx.concatenate([mx.pad(x, pad) for x, pad in zip(arrays, room, strict=True)])
