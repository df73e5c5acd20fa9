"""Blocks and the chain hash that names them.

Knows what identifies a span of tokens: the tokens themselves and everything before them.  Knows
nothing of bytes of KV, of models or of files.  Any thread.

A chain of a prompt of 600 tokens (one box is one block):

    root ── [0, 256) ── [256, 512) ── [512, 600)        root = the model's fingerprint, or a hash of
              full         full         partial         it and of the tenant whose the chain is

Every block's hash covers its parent's hash, so equal hashes mean equal whole prefixes under the
same fingerprint.  A partial block is an ordinary block with fewer tokens; it has no children.

A checkpoint is what recurrent layers keep after some token.  It is named like a block, by the chain
of full blocks before it and the tokens since, of which there may be none; it has no children, and
the KV of its tokens is in other blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b
from typing import NewType

import numpy as np

BLOCK_TOKENS = 256

BlockHash = NewType("BlockHash", bytes)
"""32 bytes.  The root of a chain and a fingerprint are such as well."""

HASH_BYTES = 32
_DOMAIN = b"agent-memory-block-1"
_CHECKPOINT_DOMAIN = b"agent-memory-checkpoint-1"
_TENANT_DOMAIN = b"agent-memory-tenant-1"


class Loss(StrEnum):
    """Why a block that was remembered is so no more."""

    EVICTED = "evicted"  # there was no room for it
    EXPIRED = "expired"  # it was not used for too long
    DAMAGED = "damaged"  # its file was not what was written
    MISSING = "missing"  # its file was removed by somebody else
    NO_ROOM = "no_room"  # there was no memory to keep it, or to bring it back


def token_bytes(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian int32, the form in which blocks hold and compare them."""
    return np.asarray(tokens, dtype="<i4").tobytes()


def in_blocks(num_tokens: int) -> int:
    """Rounded up to whole blocks."""
    return -(-num_tokens // BLOCK_TOKENS) * BLOCK_TOKENS


def common_tokens(a: bytes, b: bytes) -> int:
    """How many leading tokens two token byte strings share."""
    n = min(len(a), len(b)) // 4
    differs = np.flatnonzero(np.frombuffer(a, "<i4", n) != np.frombuffer(b, "<i4", n))
    return int(differs[0]) if differs.size else n


@dataclass(frozen=True, slots=True)
class Block:
    """The identity of 1 to BLOCK_TOKENS consecutive tokens after `parent`, or of a checkpoint after
    0 to BLOCK_TOKENS - 1.  Build with `of` and `checkpoint_after`."""

    hash: BlockHash
    parent: BlockHash
    tokens: bytes
    is_checkpoint: bool = False

    @classmethod
    def of(cls, parent: BlockHash, tokens: bytes) -> "Block":
        assert len(parent) == HASH_BYTES
        assert 0 < len(tokens) <= 4 * BLOCK_TOKENS and len(tokens) % 4 == 0
        digest = blake2b(_DOMAIN + parent + tokens, digest_size=HASH_BYTES).digest()
        return cls(BlockHash(digest), parent, tokens)

    @classmethod
    def checkpoint_after(cls, parent: BlockHash, tokens: bytes) -> "Block":
        assert len(parent) == HASH_BYTES
        assert len(tokens) < 4 * BLOCK_TOKENS and len(tokens) % 4 == 0
        data = _CHECKPOINT_DOMAIN + parent + tokens
        digest = blake2b(data, digest_size=HASH_BYTES).digest()
        return cls(BlockHash(digest), parent, tokens, True)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) // 4

    @property
    def full(self) -> bool:
        return self.num_tokens == BLOCK_TOKENS

    def token_ids(self) -> list[int]:
        ids: list[int] = np.frombuffer(self.tokens, "<i4").tolist()
        return ids


def root_of(fingerprint: BlockHash, tenant: str | None) -> BlockHash:
    """What stands before the first block of a tenant's chains, and of no other's."""
    if tenant is None:
        return fingerprint
    data = _TENANT_DOMAIN + fingerprint + tenant.encode()
    return BlockHash(blake2b(data, digest_size=HASH_BYTES).digest())


def chain(root: BlockHash, tokens: Sequence[int]) -> list[Block]:
    """The blocks of a token sequence in order; only the last may be partial."""
    data, blocks, parent = token_bytes(tokens), [], root
    for at in range(0, len(data), 4 * BLOCK_TOKENS):
        block = Block.of(parent, data[at : at + 4 * BLOCK_TOKENS])
        blocks.append(block)
        parent = block.hash
    return blocks
