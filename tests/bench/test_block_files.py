"""Files that are made like another: each is one that a store takes."""

from pathlib import Path

import numpy as np
import pytest

from agent_memory.bench import block_files
from agent_memory.block import Block, chain
from agent_memory.kv_spec import KVSpec, LayerGroup, TensorFormat
from agent_memory.store.format import decode, encode, identify

PACKED = TensorFormat(64, "BF16", bits=8, group_size=64)
SPEC = KVSpec((LayerGroup("full", (0, 1), 2, PACKED, PACKED),), "small")


@pytest.fixture
def like(tmp_path: Path) -> Path:
    return written(tmp_path, chain(SPEC.fingerprint, [5, 6, 7])[0])


def written(blocks: Path, block: Block) -> Path:
    payload = np.random.default_rng(0).integers(0, 256, SPEC.bytes_of(block), np.uint8)
    _, pieces = encode(block, payload, SPEC)
    file = blocks / block.hash.hex()[:2] / f"{block.hash.hex()}.safetensors"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"".join(bytes(piece) for piece in pieces))
    return file


def test_each_is_the_file_of_another_block_with_the_same_payload(
    tmp_path: Path, like: Path
) -> None:
    block_files.add(tmp_path, like, [0, 1, 2500])
    files = sorted(tmp_path.glob("*/*"))
    assert len(files) == 4
    payloads = set()
    for path in files:
        raw = np.fromfile(path, np.uint8)
        file = identify(raw)
        assert path.stem == file.block.hash.hex() and path.parent.name == path.stem[:2]
        assert file.fingerprint == file.block.parent == SPEC.fingerprint
        payloads.add(decode(raw, file, SPEC).tobytes())
    assert len(payloads) == 1
    assert {tuple(identify(np.fromfile(f, np.uint8)).block.token_ids()) for f in files} == {
        (5, 6, 7),
        (0, 0, 7),
        (0, 1, 7),
        (2, 500, 7),
    }


def test_the_smallest_file_is_found(tmp_path: Path, like: Path) -> None:
    written(tmp_path, chain(SPEC.fingerprint, list(range(40)))[0])
    assert block_files.smallest(tmp_path) == like
