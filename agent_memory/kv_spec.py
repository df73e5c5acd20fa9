"""What a block's payload looks like, byte for byte, and which model's it is.

Knows layer groups, tensor formats, offsets and the fingerprint.  Knows nothing of MLX arrays or
files.  Any thread: everything here is immutable.

A payload is the bytes of all tensors of a block, one after another without gaps, the wider element
types first, so that each tensor starts at a multiple of its element size.  It is the same in memory
and in the data section of a block file.  Per layer group there is one tensor for each of

    k.packed k.scales k.biases  v.packed v.scales v.biases        (quantized)
    k.dense                     v.dense                           (kept in the model's type)

of shape [layers, kv_heads, tokens, width].

A checkpoint's payload is laid out in the same way: a tensor `<layer>.<index>` for each array that a
recurrent layer keeps, whatever the number of tokens before it.
"""

import json
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b
from typing import Literal

import numpy as np

from agent_memory.block import BLOCK_TOKENS, HASH_BYTES, Block, BlockHash

KV_ABI = 1
"""Goes up when what we compute or how we lay it out changes: older blocks no longer match."""

DType = Literal["U32", "F32", "F16", "BF16"]
NUMPY: dict[str, np.dtype[np.generic]] = {
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # numpy has no bfloat16: its bit patterns
}
Kind = Literal["full", "window", "latent"]


@dataclass(frozen=True, slots=True)
class TensorFormat:
    """How the K (or V) of one head and token is kept: `dim` numbers, in `bits` each, or as `dtype`.

    bits None: dense in `dtype`.  Else affine quantization in groups of `group_size` along dim,
    with a scale and a bias of `dtype` per group.
    """

    dim: int
    dtype: DType
    bits: int | None = None
    group_size: int = 0

    def tensors(self) -> list[tuple[str, DType, int]]:
        """(name, element type, width) of each stored tensor, in the order MLX returns them."""
        if self.bits is None:
            return [("dense", self.dtype, self.dim)]
        groups = self.dim // self.group_size
        return [
            ("packed", "U32", self.dim * self.bits // 32),
            ("scales", self.dtype, groups),
            ("biases", self.dtype, groups),
        ]


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers whose KV has one shape.  `layers` index the model's list of caches."""

    kind: Kind
    layers: tuple[int, ...]
    kv_heads: int
    k: TensorFormat
    v: TensorFormat
    window: int | None = None


@dataclass(frozen=True, slots=True)
class StateFormat:
    """One array that a recurrent layer keeps of everything before, without the batch axis.

    `layer` indexes the model's list of caches, as in groups, `index` the arrays of that cache.
    """

    layer: int
    index: int
    shape: tuple[int, ...]
    dtype: DType


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """Where a tensor of a block lies in its payload."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def view(self, payload: np.ndarray) -> np.ndarray:
        """This tensor as a view of a payload (uint8, one dimension)."""
        raw = payload[self.offset : self.offset + self.nbytes]
        return raw.view(NUMPY[self.dtype]).reshape(self.shape)


@dataclass(frozen=True)
class KVSpec:
    """The KV of one loaded model.  Equal fingerprints mean exchangeable blocks."""

    groups: tuple[LayerGroup, ...]
    model_digest: str
    """Digest over weights, config, adapter and tokenizer: see model/loader.py."""
    states: tuple[StateFormat, ...] = ()
    """Of recurrent layers, which keep no KV."""

    @cached_property
    def fingerprint(self) -> BlockHash:
        """The root of every chain of this model."""
        facts = asdict(self) | {"block_tokens": BLOCK_TOKENS, "kv_abi": KV_ABI}
        text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
        return BlockHash(blake2b(text.encode(), digest_size=HASH_BYTES).digest())

    @cached_property
    def bytes_per_token(self) -> int:
        return payload_bytes(self.groups, 1)

    def slots(self, num_tokens: int) -> tuple[TensorSlot, ...]:
        return layout(self.groups, num_tokens)

    def payload_bytes(self, num_tokens: int) -> int:
        return payload_bytes(self.groups, num_tokens)

    @cached_property
    def state_slots(self) -> tuple[TensorSlot, ...]:
        return _in_order([(f"{s.layer}.{s.index}", s.dtype, s.shape) for s in self.states])

    @property
    def state_bytes(self) -> int:
        """Of a checkpoint."""
        return _end(self.state_slots)

    @cached_property
    def checkpoint_tokens(self) -> int:
        """From one regular checkpoint to the next: so far that their bytes are at most half of
        those of the KV between them.  0: there is nothing to take one of."""
        if not self.states:
            return 0
        return BLOCK_TOKENS * -(-2 * self.state_bytes // self.payload_bytes(BLOCK_TOKENS))

    def slots_of(self, block: Block) -> tuple[TensorSlot, ...]:
        return self.state_slots if block.is_checkpoint else self.slots(block.num_tokens)

    def bytes_of(self, block: Block) -> int:
        """Of its payload."""
        return self.state_bytes if block.is_checkpoint else self.payload_bytes(block.num_tokens)


@lru_cache(maxsize=4 * BLOCK_TOKENS)
def layout(groups: tuple[LayerGroup, ...], num_tokens: int) -> tuple[TensorSlot, ...]:
    """The tensors of a block of `num_tokens`, in payload order."""
    tensors: list[tuple[str, DType, tuple[int, ...]]] = []
    for g, group in enumerate(groups):
        for side, form in (("k", group.k), ("v", group.v)):
            for name, dtype, width in form.tensors():
                tensors.append(
                    (
                        f"{g}.{side}.{name}",
                        dtype,
                        (len(group.layers), group.kv_heads, num_tokens, width),
                    )
                )
    return _in_order(tensors)


def payload_bytes(groups: tuple[LayerGroup, ...], num_tokens: int) -> int:
    return _end(layout(groups, num_tokens))


def _in_order(tensors: list[tuple[str, DType, tuple[int, ...]]]) -> tuple[TensorSlot, ...]:
    slots, offset = [], 0
    for name, dtype, shape in sorted(tensors, key=lambda t: -NUMPY[t[1]].itemsize):  # stable
        nbytes = NUMPY[dtype].itemsize * int(np.prod(shape))
        slots.append(TensorSlot(name, dtype, shape, offset, nbytes))
        offset += nbytes
    return tuple(slots)


def _end(slots: tuple[TensorSlot, ...]) -> int:
    return slots[-1].offset + slots[-1].nbytes if slots else 0
