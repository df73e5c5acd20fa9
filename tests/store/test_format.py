"""The bytes of a block file: golden, readable by others, and nothing else accepted."""

import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load

from agent_memory.block import BLOCK_TOKENS, Block, BlockHash, chain, token_bytes
from agent_memory.kv_spec import KVSpec, LayerGroup, StateFormat, TensorFormat
from agent_memory.store.files import Bytes
from agent_memory.store.format import (
    MAX_HEADER_BYTES,
    BlockFile,
    Rejected,
    decode,
    describe_groups,
    describe_states,
    encode,
    identify,
    size_of_file,
)

DOC = Path(__file__).parents[2] / "docs" / "format.md"
F16 = TensorFormat(2, "F16")
PACKED = TensorFormat(128, "BF16", bits=4, group_size=64)
DENSE = TensorFormat(64, "BF16")


def file_of(block: Block, payload: Bytes, spec: KVSpec) -> tuple[BlockFile, bytes]:
    file, pieces = encode(block, payload, spec)
    return file, b"".join(pieces)


def array(raw: bytes) -> Bytes:
    return np.frombuffer(raw, np.uint8)


def refusal(raw: bytes, file: BlockFile, spec: KVSpec) -> str:
    with pytest.raises(Rejected) as caught:
        decode(array(raw), file, spec)
    return caught.value.reason


@pytest.fixture
def block(spec: KVSpec) -> Block:
    return chain(spec.fingerprint, range(1000, 1100))[0]


@pytest.fixture
def payload(spec: KVSpec) -> Bytes:
    return np.random.default_rng(1).integers(0, 256, spec.payload_bytes(100), np.uint8)


def test_the_bytes_in_the_document_are_the_bytes_written() -> None:
    dump = re.search(r"```hexdump\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert dump is not None
    documented = b"".join(bytes.fromhex(line[10:58]) for line in dump[1].splitlines())

    spec = KVSpec((LayerGroup("full", (0,), 1, F16, F16),), "example")
    block = Block.of(spec.fingerprint, token_bytes([1, 2, 3]))
    payload = np.arange(1, 25, dtype=np.uint8)
    assert file_of(block, payload, spec)[1] == documented


@pytest.mark.parametrize(
    "group",
    [
        LayerGroup("full", (0, 1), 8, PACKED, PACKED),
        LayerGroup("window", (2, 3), 4, DENSE, DENSE, window=1024),
        LayerGroup("latent", (0, 1), 1, TensorFormat(512, "BF16"), DENSE),
    ],
    ids=lambda group: group.kind,
)
def test_every_kind_of_group_is_documented_as_it_is_written(group: LayerGroup) -> None:
    assert describe_groups([group]) in DOC.read_text()


def test_the_header_of_a_checkpoint_in_the_document_is_the_one_written() -> None:
    shown = re.search(r"```checkpoint\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert shown is not None
    text = shown[1].replace("\n", "").encode()

    groups = (LayerGroup("full", (0,), 1, F16, F16),)
    states = (StateFormat(1, 0, (3, 2), "F16"), StateFormat(1, 1, (2,), "F32"))
    spec = KVSpec(groups, "example", states)
    checkpoint = Block.checkpoint_after(spec.fingerprint, token_bytes([1, 2, 3]))
    raw = file_of(checkpoint, np.arange(1, 21, dtype=np.uint8), spec)[1]
    assert raw[8:0x2C0] == text.ljust(0x2C0 - 8) and len(raw) == 0x2C0 + 12 + 20


@pytest.mark.parametrize("num_tokens", [0, 1, BLOCK_TOKENS - 1])
def test_round_trip_of_a_checkpoint(tmp_path: Path, spec: KVSpec, num_tokens: int) -> None:
    checkpoint = Block.checkpoint_after(spec.fingerprint, token_bytes(range(num_tokens)))
    payload = np.arange(spec.state_bytes).astype(np.uint8)
    file, raw = file_of(checkpoint, payload, spec)
    assert identify(array(raw)) == file and size_of_file(checkpoint, spec) == len(raw)
    assert decode(array(raw), file, spec).tobytes() == payload.tobytes()
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(raw)
    with safe_open(path, "numpy") as opened:
        assert opened.metadata()["states"] == describe_states(spec.states)
        assert opened.get_tensor("token_ids").tolist() == [*range(num_tokens)]
        wide = spec.state_slots[0]
        np.testing.assert_array_equal(opened.get_tensor(wide.name), wide.view(payload))
    read = mx.load(str(path))
    assert isinstance(read, dict) and read.pop("token_ids").tolist() == [*range(num_tokens)]
    shapes = {name: tensor.shape for name, tensor in read.items()}
    assert shapes == {slot.name: slot.shape for slot in spec.state_slots}


def test_a_checkpoint_is_no_block_of_the_same_tokens(spec: KVSpec, block: Block) -> None:
    checkpoint = Block.checkpoint_after(block.parent, block.tokens)
    file, raw = file_of(checkpoint, np.zeros(spec.state_bytes, np.uint8), spec)
    assert refusal(raw, replace(file, block=block), spec) == "size"
    assert relabelled(raw, "checkpoint", "block") == "tokens"
    for num_tokens, reason in ((100, "tokens"), (BLOCK_TOKENS, "header")):
        other = chain(spec.fingerprint, range(1000, 1000 + num_tokens))[0]
        zeros = np.zeros(spec.payload_bytes(num_tokens), np.uint8)
        assert relabelled(file_of(other, zeros, spec)[1], "block", "checkpoint") == reason


def relabelled(raw: bytes, old: str, new: str) -> str:
    """Why a file whose header says that it is the other kind is not identified."""
    start = 8 + int.from_bytes(raw[:8], "little")
    header = raw[8:start].replace(f"memory-{old}/1".encode(), f"memory-{new}/1".encode())
    assert header != raw[8:start]
    with pytest.raises(Rejected) as caught:
        identify(array(len(header).to_bytes(8, "little") + header + raw[start:]))
    return caught.value.reason


def test_other_states_are_another_shape(spec: KVSpec) -> None:
    checkpoint = Block.checkpoint_after(spec.fingerprint, b"")
    file, raw = file_of(checkpoint, np.zeros(spec.state_bytes, np.uint8), spec)
    for old, new in ((b"[2,48]", b"[4,24]"), (rb"\"index\":1", rb"\"index\":2")):
        assert old in raw and refusal(raw.replace(old, new), file, spec) == "shape"
    other = replace(spec, states=(replace(spec.states[0], shape=(48, 2)), spec.states[1]))
    assert refusal(raw, file, other) == "fingerprint"


@pytest.mark.requirement("B-17")
@pytest.mark.parametrize("num_tokens", [1, 7, 100, BLOCK_TOKENS])
def test_round_trip(spec: KVSpec, num_tokens: int) -> None:
    block = chain(spec.fingerprint, range(num_tokens))[0]
    payload = np.arange(spec.payload_bytes(num_tokens)).astype(np.uint8)
    file, raw = file_of(block, payload, spec)
    assert identify(array(raw)) == file
    again = decode(np.frombuffer(bytearray(raw), np.uint8), file, spec)
    assert again.tobytes() == payload.tobytes()
    assert again.flags.writeable and again.ctypes.data % 4 == 0
    assert all(slot.view(again).shape == slot.shape for slot in spec.slots(num_tokens))


def test_the_data_begins_at_64_and_nothing_is_copied(
    spec: KVSpec, block: Block, payload: Bytes
) -> None:
    _, [header, tokens, data] = encode(block, payload, spec)
    assert len(header) % 64 == 0 and tokens == block.tokens
    assert np.shares_memory(np.asarray(data), payload)


def test_read_by_safetensors(tmp_path: Path) -> None:
    spec = KVSpec((LayerGroup("full", (0, 1), 2, F16, TensorFormat(3, "F32")),), "f16")
    block = Block.of(spec.fingerprint, token_bytes([5, 6]))
    payload = np.random.default_rng(2).integers(0, 100, spec.payload_bytes(2), np.uint8)
    raw = file_of(block, payload, spec)[1]
    tensors = load(raw)
    assert tensors.pop("token_ids").tolist() == [5, 6]
    assert tensors.keys() == {slot.name for slot in spec.slots(2)}
    for slot in spec.slots(2):
        np.testing.assert_array_equal(tensors[slot.name], slot.view(payload))
    path = tmp_path / "block.safetensors"
    path.write_bytes(raw)
    with safe_open(path, "numpy") as opened:
        assert opened.metadata()["hash"] == block.hash.hex()


def test_read_by_mlx(tmp_path: Path, spec: KVSpec, block: Block, payload: Bytes) -> None:
    path = tmp_path / "block.safetensors"
    path.write_bytes(file_of(block, payload, spec)[1])
    tensors = mx.load(str(path))
    assert isinstance(tensors, dict)
    assert tensors["token_ids"].tolist() == block.token_ids()
    for slot in spec.slots(100):
        found = tensors[slot.name]
        if slot.dtype == "BF16":
            found = found.view(mx.uint16)
        np.testing.assert_array_equal(np.array(found), slot.view(payload))


@pytest.mark.requirement("B-17", "L-41")
def test_refusals_name_what_differs(spec: KVSpec, block: Block, payload: Bytes) -> None:
    file, raw = file_of(block, payload, spec)
    other_model = replace(spec, model_digest="other")
    first, second = spec.groups
    rolled = replace(spec, groups=(replace(first, layers=(1, 3)), second))
    sibling = chain(spec.fingerprint, range(2000, 2100))[0]
    header_end = 8 + int.from_bytes(raw[:8], "little")

    def flipped(at: int) -> bytes:
        return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]

    assert refusal(raw[:-1], file, spec) == "size"
    assert refusal(raw + b"\0", file, spec) == "size"
    assert refusal(b"", file, spec) == "size"
    assert refusal(flipped(0), file, spec) == "header"
    assert refusal((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + raw[8:], file, spec) == "header"
    assert refusal(flipped(header_end), file, spec) == "checksum"
    assert refusal(flipped(len(raw) - 1), file, spec) == "checksum"
    assert refusal(raw, file, other_model) == "fingerprint"
    assert refusal(raw, file, rolled) == "fingerprint"
    assert refusal(raw.replace(b"[2,1,100,8]", b"[1,2,100,8]"), file, spec) == "shape"
    assert refusal(raw, replace(file, block=sibling), spec) == "tokens"
    assert refusal(raw.replace(b"block/1", b"block/2"), file, spec) == "header"
    assert refusal(raw.replace(b'"format":', b'"format" '), file, spec) == "header"

    swapped = raw.replace(block.hash.hex().encode(), sibling.hash.hex().encode())
    assert refusal(swapped, replace(file, block=sibling), spec) == "tokens"


def test_a_block_under_another_name_is_not_identified(
    spec: KVSpec, block: Block, payload: Bytes
) -> None:
    _, raw = file_of(block, payload, spec)
    parent, child = block.parent.hex().encode(), block.hash.hex().encode()
    for lie in (
        raw.replace(child, parent),
        raw.replace(b'"parent":"', b'"parent":"00', 1),
        raw.replace(b'"hash":', b'"hasi":', 1),
    ):
        with pytest.raises(Rejected):
            identify(array(lie))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{}",
        b"null",
        b'{"__metadata__":[]}',
        b'{"__metadata__":{}}',
        b"[" * 100_000,
        b'{"__metadata__":{"format":"agent-memory-block/1"},"token_ids":{"shape":[-1]}}',
        b"\xff\xfe",
    ],
    ids=repr,
)
def test_hostile_headers_are_not_identified(text: bytes) -> None:
    with pytest.raises(Rejected, match="header"):
        identify(array(len(text).to_bytes(8, "little") + text + bytes(64)))


@pytest.mark.parametrize("shape", [0, -1, BLOCK_TOKENS + 1, 1 << 40, True, 1.5, 100.0, "1", None])
def test_hostile_token_counts_are_not_identified(
    spec: KVSpec, block: Block, payload: Bytes, shape: object
) -> None:
    raw = file_of(block, payload, spec)[1]
    start = 8 + int.from_bytes(raw[:8], "little")
    header = raw[8:start].replace(b'"shape":[100]', f'"shape":[{shape}]'.encode())
    assert header != raw[8:start]
    with pytest.raises(Rejected):
        identify(array(len(header).to_bytes(8, "little") + header + raw[start:]))


MUTATIONS = ["flip", "flip_header", "truncate", "zero_page", "swap_pages", "tail", "length"]


def mutate(raw: bytes, how: str, rng: random.Random) -> bytes:
    data, at = bytearray(raw), rng.randrange(len(raw))
    header_end = 8 + int.from_bytes(raw[:8], "little")
    page = rng.randrange(0, len(raw) - 512, 64)
    match how:
        case "flip":
            data[at] ^= 1 << rng.randrange(8)
        case "flip_header":
            data[at % header_end] ^= 1 << rng.randrange(8)
        case "truncate":
            del data[at:]
        case "zero_page":
            data[page : page + 512] = bytes(512)
        case "swap_pages":
            data[page : page + 256], data[page + 256 : page + 512] = (
                data[page + 256 : page + 512],
                data[page : page + 256],
            )
        case "tail":
            data += rng.randbytes(rng.randrange(1, 100))
        case "length":
            data[:8] = rng.randbytes(8)
    return bytes(data)


def test_of_2000_mutated_files_none_is_accepted(spec: KVSpec, block: Block, payload: Bytes) -> None:
    file, raw = file_of(block, payload, spec)
    rng, reasons = random.Random(7), Counter[str]()
    for n in range(2000):
        mutated = mutate(raw, MUTATIONS[n % len(MUTATIONS)], rng)
        assert mutated != raw
        reasons[refusal(mutated, file, spec)] += 1
    assert reasons.keys() >= {"size", "header", "checksum", "shape", "tokens"}


def test_a_mutated_file_is_never_identified_as_another_block(
    spec: KVSpec, block: Block, payload: Bytes
) -> None:
    """What is adopted has the right tokens and data; `decode` proves the rest."""
    file, raw = file_of(block, payload, spec)
    rng, identified = random.Random(8), 0
    for n in range(1000):
        try:
            found = identify(array(mutate(raw, MUTATIONS[n % len(MUTATIONS)], rng)))
        except Rejected:
            continue
        identified += 1
        assert (found.block, found.checksum) == (file.block, file.checksum)
    assert identified < 200


def test_parent_of_any_32_bytes(spec: KVSpec) -> None:
    block = Block.of(BlockHash(bytes(32)), token_bytes([-1, 2**31 - 1]))
    payload = np.zeros(spec.payload_bytes(2), np.uint8)
    file, raw = file_of(block, payload, spec)
    assert identify(array(raw)).block == block == file.block
