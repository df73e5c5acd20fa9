"""An agent in one file: what an export is made of, byte for byte.

A plain tar, so that people can look inside:

    manifest.json                 whose it is, of which model, heads, blocks and checkpoints
    manifest.xxh3-128             checksum of the manifest, 32 hex digits
    blocks/<64 hex>.safetensors   each of them once, as in the store, in the manifest's order

Knows the format and its bounds.  Every byte is covered: there is one right tar header for a member,
the manifest has its checksum, and a block file covers itself.  Names in a file are compared, never
used.  Knows nothing of threads; any thread.
"""

import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeGuard

from xxhash import xxh3_128_hexdigest

from agent_memory.block import BLOCK_TOKENS, HASH_BYTES, BlockHash
from agent_memory.errors import BadRequest
from agent_memory.store.agents import MAX_HEADS
from agent_memory.store.format import MAX_FILE_BYTES

FORMAT = "agent-memory-export/2"
MEDIA_TYPE = "application/x-tar"
MANIFEST = "manifest.json"
CHECKSUM = "manifest.xxh3-128"
END = bytes(2 * tarfile.BLOCKSIZE)
MAX_MANIFEST_BYTES = 32 << 20
_HEX = frozenset("0123456789abcdef")

Turns = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class ArchivedHead:
    """`blocks`: hashes in the order of the chain, `checkpoints` by position.  As in store/heads.py
    else."""

    num_tokens: int
    turns: Turns
    blocks: tuple[BlockHash, ...]
    checkpoints: tuple[BlockHash, ...] = ()


@dataclass(frozen=True, slots=True)
class ArchivedBlock:
    """A block or a checkpoint.  `checksum`: xxh3-128 of the file's data, as its header has it."""

    hash: BlockHash
    file_bytes: int
    checksum: bytes

    @property
    def name(self) -> str:
        return f"blocks/{self.hash.hex()}.safetensors"


@dataclass(frozen=True, slots=True)
class Manifest:
    """`heads`: the newest first."""

    agent: str
    model: str
    fingerprint: BlockHash
    heads: tuple[ArchivedHead, ...]
    blocks: tuple[ArchivedBlock, ...]

    def head(self) -> bytes:
        """Everything in the file before the first block."""
        text = json.dumps(
            {
                "format": FORMAT,
                "agent": self.agent,
                "model": self.model,
                "fingerprint": self.fingerprint.hex(),
                "heads": [
                    {
                        "tokens": head.num_tokens,
                        "turns": head.turns,
                        "blocks": [block_hash.hex() for block_hash in head.blocks],
                        "checkpoints": [block_hash.hex() for block_hash in head.checkpoints],
                    }
                    for head in self.heads
                ],
                "blocks": [
                    {
                        "hash": block.hash.hex(),
                        "bytes": block.file_bytes,
                        "xxh3_128": block.checksum.hex(),
                    }
                    for block in self.blocks
                ],
            },
            indent=1,
        ).encode()
        checksum = xxh3_128_hexdigest(text).encode()
        return member(MANIFEST, text) + member(CHECKSUM, checksum)

    @property
    def archive_bytes(self) -> int:
        """Of the whole file."""
        sizes = (tarfile.BLOCKSIZE + _padded(block.file_bytes) for block in self.blocks)
        return len(self.head()) + sum(sizes) + len(END)


def member(name: str, data: bytes) -> bytes:
    return header(name, len(data)) + data + padding(len(data))


def header(name: str, size: int) -> bytes:
    """The one tar header that a member of ours may have."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o600
    return info.tobuf(tarfile.USTAR_FORMAT)


def padding(size: int) -> bytes:
    return bytes(_padded(size) - size)


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


class ArchiveReader:
    """Reads in order: the manifest, then each of its blocks.  Raises BadRequest on any doubt."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        text = self._member(MANIFEST, self._manifest_bytes(), back=tarfile.BLOCKSIZE)
        if self._member(CHECKSUM, 32) != xxh3_128_hexdigest(text).encode():
            raise damaged("its manifest is not what was written")
        self.manifest = _manifest(text)

    def block(self, block: ArchivedBlock) -> bytes:
        return self._member(block.name, block.file_bytes)

    def end(self) -> None:
        if self._file.read(len(END) + 1) != END:
            raise damaged("it does not end where it should")

    def _manifest_bytes(self) -> int:
        try:
            info = tarfile.TarInfo.frombuf(self._file.read(tarfile.BLOCKSIZE), "ascii", "strict")
        except (tarfile.HeaderError, ValueError):
            raise _foreign() from None
        if info.name != MANIFEST or not 0 < info.size <= MAX_MANIFEST_BYTES:
            raise _foreign()
        return info.size

    def _member(self, name: str, size: int, back: int = 0) -> bytes:
        self._file.seek(-back, 1)
        if self._file.read(tarfile.BLOCKSIZE) != header(name, size):
            raise damaged(f"'{name}' is not where it should be")
        data = self._file.read(_padded(size))
        if len(data) != _padded(size) or any(data[size:]):
            raise damaged(f"'{name}' is cut off or has something behind it")
        return data[:size]


def damaged(what: str) -> BadRequest:
    return BadRequest(
        f"The file is damaged: {what}. Nothing of it was kept. Export it again.",
        code="damaged_export",
    )


def _foreign() -> BadRequest:
    return BadRequest(
        f"The body is no export of this server ({FORMAT}). Send what GET …/export answered.",
        code="not_an_export",
    )


def _manifest(text: bytes) -> Manifest:
    try:
        values = json.loads(text)
        if values["format"] != FORMAT:
            raise _foreign()
        manifest = Manifest(
            agent=_text(values["agent"]),
            model=_text(values["model"]),
            fingerprint=_hash(values["fingerprint"]),
            heads=tuple(map(_head, _items(values["heads"]))),
            blocks=tuple(map(_block, _items(values["blocks"]))),
        )
        _check(manifest)
    except (KeyError, TypeError, ValueError, RecursionError):
        raise damaged("its manifest does not say what it must") from None
    return manifest


def _check(manifest: Manifest) -> None:
    """Raises ValueError unless heads and blocks fit together.  That chains are chains only the
    blocks themselves can prove."""
    hashes = [block.hash for block in manifest.blocks]
    used = {h for head in manifest.heads for h in (*head.blocks, *head.checkpoints)}
    if not 0 < len(manifest.heads) <= MAX_HEADS:
        raise ValueError
    if len(set(hashes)) != len(hashes) or set(hashes) != used:
        raise ValueError
    for head in manifest.heads:
        num_full = BLOCK_TOKENS * (len(head.blocks) - 1)
        if num_full < 0 or not num_full < head.num_tokens <= num_full + BLOCK_TOKENS:
            raise ValueError
        if not _are_turns(head.turns, head.num_tokens):
            raise ValueError


def _are_turns(turns: Turns, num_tokens: int) -> bool:
    start = 0
    for prompt_end, end in turns:
        if not start < prompt_end <= end <= num_tokens:
            return False
        start = end
    return True


def _head(value: Any) -> ArchivedHead:
    turns = tuple((_whole(a), _whole(b)) for a, b in _items(value["turns"]))
    blocks, checkpoints = (
        tuple(map(_hash, _items(value[part]))) for part in ("blocks", "checkpoints")
    )
    return ArchivedHead(_whole(value["tokens"]), turns, blocks, checkpoints)


def _block(value: Any) -> ArchivedBlock:
    file_bytes = _whole(value["bytes"])
    if not 0 < file_bytes <= MAX_FILE_BYTES:
        raise ValueError
    return ArchivedBlock(_hash(value["hash"]), file_bytes, _from_hex(value["xxh3_128"], 16))


def _items(value: object) -> Sequence[Any]:
    if not isinstance(value, list):
        raise ValueError
    return value


def _text(value: object) -> str:
    if not (isinstance(value, str) and len(value) <= 4096 and value.isprintable()):
        raise ValueError
    return value


def _whole(value: object) -> int:
    if not _is_whole(value):
        raise ValueError
    return value


def _is_whole(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 1 << 40


def _hash(value: object) -> BlockHash:
    return BlockHash(_from_hex(value, HASH_BYTES))


def _from_hex(value: object, num_bytes: int) -> bytes:
    if not (isinstance(value, str) and len(value) == 2 * num_bytes and _HEX.issuperset(value)):
        raise ValueError
    return bytes.fromhex(value)
