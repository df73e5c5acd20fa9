"""More block files for a store, each like one that a server wrote.

Knows the file's format, docs/format.md tells it.  What such a file has in mind is what the one has:
good for whoever counts or checks files, not for a conversation.  Main thread.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from xxhash import xxh3_128

from agent_memory.block import Block, BlockHash, token_bytes

LENGTH_BYTES = 8
IDS = 1000
"""Token ids that any tokenizer has."""


def smallest(blocks: Path) -> Path:
    """Of the files in a store's folder of blocks."""
    return min(blocks.glob("*/*.safetensors"), key=lambda file: file.stat().st_size)


def add(blocks: Path, like: Path, numbers: Iterable[int]) -> None:
    """A file for each number, with other first tokens.  `like`: of two tokens or more."""
    raw = like.read_bytes()
    data_at = LENGTH_BYTES + int.from_bytes(raw[:LENGTH_BYTES], "little")
    header = raw[:data_at]
    tensors = json.loads(header[LENGTH_BYTES:])
    about = tensors["__metadata__"]
    parent = BlockHash(bytes.fromhex(about["parent"]))
    [num_tokens] = tensors["token_ids"]["shape"]
    assert num_tokens > 1, "no room for a number"
    for number in numbers:
        first = token_bytes([number // IDS, number % IDS])
        tokens = first + raw[data_at + len(first) : data_at + 4 * num_tokens]
        data = tokens + raw[data_at + len(tokens) :]
        name = Block.of(parent, tokens).hash.hex()
        own = header.replace(about["hash"].encode(), name.encode())
        own = own.replace(about["data_xxh3_128"].encode(), xxh3_128(data).hexdigest().encode())
        folder = blocks / name[:2]
        folder.mkdir(mode=0o700, exist_ok=True)
        (folder / f"{name}.safetensors").write_bytes(own + data)
