"""A block, or a checkpoint, as the bytes of one safetensors file.

Knows the format, docs/format.md tells it.  Knows nothing of paths or threads.  Any thread.

    8 bytes           length of the header, little-endian
    the header        JSON, padded with spaces so that the data begins at a multiple of 64
    the data          token ids, then the payload; no holes

A header is a function of the block, its model and the data's checksum.  So there is one right
header for an expected block, and reading means comparing with it, byte for byte.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from xxhash import xxh3_128

from agent_memory.block import BLOCK_TOKENS, HASH_BYTES, Block, BlockHash
from agent_memory.kv_spec import KVSpec, LayerGroup, StateFormat
from agent_memory.store.files import Bytes, Piece

FORMAT = "agent-memory-block/1"
CHECKPOINT_FORMAT = "agent-memory-checkpoint/1"
MAX_HEADER_BYTES = 1 << 20
MAX_FILE_BYTES = 1 << 30
"""What is larger is no file of ours, whatever model it is of."""
_ALIGN = 64
_LENGTH_BYTES = 8
_NO_CHECKSUM = bytes(xxh3_128().digest_size)


class Rejected(Exception):
    """A file is not the block it should be.  `reason`: size, header, checksum, fingerprint, shape,
    tokens; and, from those who look for files, missing or io."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class BlockFile:
    """What is known of a good block file without opening it.  `checksum` covers its data."""

    block: Block
    fingerprint: BlockHash
    file_bytes: int
    checksum: bytes


def encode(block: Block, payload: Bytes, spec: KVSpec) -> tuple[BlockFile, list[Piece]]:
    """The file's description and the pieces to write, the payload not copied."""
    assert payload.dtype == np.uint8 and payload.shape == (spec.bytes_of(block),)
    checksum = _checksum(block.tokens, payload.data)
    header = _header(block, spec, checksum)
    file_bytes = len(header) + len(block.tokens) + payload.nbytes
    file = BlockFile(block, spec.fingerprint, file_bytes, checksum)
    return file, [header, block.tokens, payload.data]


def size_of_file(block: Block, spec: KVSpec) -> int:
    """In bytes, whatever the payload is."""
    header = _header(block, spec, _NO_CHECKSUM)
    return len(header) + len(block.tokens) + spec.bytes_of(block)


def full_file_bytes(spec: KVSpec) -> int:
    """The size of every file of a full block of this model."""
    return size_of_file(Block.of(spec.fingerprint, bytes(4 * BLOCK_TOKENS)), spec)


def most_file_bytes(spec: KVSpec) -> int:
    """No file of this model, of a block or a checkpoint, is larger."""
    tokens = bytes(4 * (BLOCK_TOKENS - 1))
    checkpoint = Block.checkpoint_after(spec.fingerprint, tokens) if spec.states else None
    return max(full_file_bytes(spec), size_of_file(checkpoint, spec) if checkpoint else 0)


def decode(raw: Bytes, file: BlockFile, spec: KVSpec) -> Bytes:
    """The payload in `raw`, the whole file: a view of it.  Raises Rejected on any difference."""
    block = file.block
    header = _header(block, spec, file.checksum)
    start, payload_at = len(header), len(header) + len(block.tokens)
    if raw.size != file.file_bytes or raw.size != payload_at + spec.bytes_of(block):
        raise Rejected("size")
    if _data_offset(raw) != start:
        raise Rejected("header")
    if _checksum(raw[start:].data) != file.checksum:
        raise Rejected("checksum")
    if (found := raw[:start].tobytes()) != header:
        raise Rejected(_difference(found, header))
    if raw[start:payload_at].tobytes() != block.tokens:
        raise Rejected("tokens")
    return raw[payload_at:]


def identify(raw: Bytes) -> BlockFile:
    """Which block a file found without a row in the index holds.  Raises Rejected.

    Proves that tokens, parent and hash belong together and that the data is whole.  Shapes are
    proved by `decode`, which knows the model.
    """
    start = _data_offset(raw)
    tensors = _parse(raw[:start].tobytes())
    data = raw[start:]
    try:
        about = tensors["__metadata__"]
        checksum = bytes.fromhex(about["data_xxh3_128"])
        fingerprint = bytes.fromhex(about["fingerprint"])
        parent = bytes.fromhex(about["parent"])
        name = about["hash"]
        [num_tokens] = tensors["token_ids"]["shape"]
        is_checkpoint = about["format"] == CHECKPOINT_FORMAT
        good = is_checkpoint or about["format"] == FORMAT
        lengths = range(BLOCK_TOKENS) if is_checkpoint else range(1, BLOCK_TOKENS + 1)
        good = good and type(num_tokens) is int and num_tokens in lengths
    except (KeyError, TypeError, ValueError):
        raise Rejected("header") from None
    if not good or {len(fingerprint), len(parent)} != {HASH_BYTES}:
        raise Rejected("header")
    if data.size < 4 * num_tokens:
        raise Rejected("size")
    if _checksum(data.data) != checksum:
        raise Rejected("checksum")
    named = Block.checkpoint_after if is_checkpoint else Block.of
    block = named(BlockHash(parent), data[: 4 * num_tokens].tobytes())
    if block.hash.hex() != name:
        raise Rejected("tokens")
    return BlockFile(block, BlockHash(fingerprint), raw.size, checksum)


def _header(block: Block, spec: KVSpec, checksum: bytes) -> bytes:
    """The length word and the padded header of the one file that may hold this block."""
    if block.is_checkpoint:
        about, layout = CHECKPOINT_FORMAT, {"states": describe_states(spec.states)}
    else:
        about, layout = FORMAT, {"groups": describe_groups(spec.groups)}
    tensors: dict[str, object] = {
        "__metadata__": {
            "format": about,
            "fingerprint": spec.fingerprint.hex(),
            "hash": block.hash.hex(),
            "parent": block.parent.hex(),
            **layout,
            "data_xxh3_128": checksum.hex(),
        },
        "token_ids": _tensor("I32", [block.num_tokens], 0, len(block.tokens)),
    }
    for slot in spec.slots_of(block):
        begin = len(block.tokens) + slot.offset
        tensors[slot.name] = _tensor(slot.dtype, slot.shape, begin, slot.nbytes)
    text = _compact(tensors).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _ALIGN)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _tensor(dtype: str, shape: Sequence[int], begin: int, nbytes: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + nbytes]}


def describe_groups(groups: Sequence[LayerGroup]) -> str:
    return _compact([asdict(group) for group in groups])


def describe_states(states: Sequence[StateFormat]) -> str:
    return _compact([asdict(state) for state in states])


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _checksum(*pieces: Piece) -> bytes:
    digest = xxh3_128()
    for piece in pieces:
        digest.update(piece)
    return digest.digest()


def _data_offset(raw: Bytes) -> int:
    """Where the data begins.  Raises Rejected unless a header of sane length fits before it."""
    if raw.size < _LENGTH_BYTES:
        raise Rejected("size")
    length = int.from_bytes(raw[:_LENGTH_BYTES].tobytes(), "little")
    if length > MAX_HEADER_BYTES or _LENGTH_BYTES + length > raw.size:
        raise Rejected("header")
    return _LENGTH_BYTES + length


def _parse(header: bytes) -> dict[str, Any]:
    try:
        tensors = json.loads(header[_LENGTH_BYTES:])
    except (ValueError, RecursionError):
        raise Rejected("header") from None
    if not isinstance(tensors, dict) or not isinstance(tensors.get("__metadata__"), dict):
        raise Rejected("header")
    return tensors


def _difference(found: bytes, expected: bytes) -> str:
    """The word for what a well-formed header says otherwise than it should."""
    theirs, ours = _parse(found), _parse(expected)
    about, expected_about = theirs.pop("__metadata__"), ours.pop("__metadata__")
    changed = {key for key in expected_about if about.get(key) != expected_about[key]}
    if "fingerprint" in changed:
        return "fingerprint"
    if changed & {"groups", "states"} or theirs != ours:
        return "shape"
    return "tokens" if changed & {"hash", "parent"} else "header"
