"""The layout of payloads, computed here a second time by hand, and what the fingerprint covers."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from agent_memory import kv_spec
from agent_memory.block import BLOCK_TOKENS, Block, token_bytes
from agent_memory.kv_spec import NUMPY, DType, KVSpec, LayerGroup, StateFormat, TensorFormat


def group(
    k: TensorFormat, v: TensorFormat | None = None, layers: tuple[int, ...] = (0, 1)
) -> LayerGroup:
    return LayerGroup("full", layers, 2, k, v or k)


def spec(*groups: LayerGroup) -> KVSpec:
    return KVSpec(groups, "digest")


def packed(bits: int, dtype: DType = "F32", dim: int = 128, group_size: int = 64) -> TensorFormat:
    return TensorFormat(dim, dtype, bits, group_size)


DENSE_BF16 = TensorFormat(80, "BF16")
TWO_GROUPS = spec(
    group(packed(4, "BF16"), layers=(0, 2)),
    group(TensorFormat(80, "BF16"), TensorFormat(48, "BF16"), layers=(1,)),
)
SPECS = {
    "8": spec(group(packed(8))),
    "4": spec(group(packed(4))),
    "none": spec(group(TensorFormat(128, "F32"))),
    "bf16": spec(group(DENSE_BF16)),
    "8 of bf16": spec(group(packed(8, "BF16"))),
    "k and v differ": spec(group(packed(8, "F16"), TensorFormat(80, "F16"))),
    "two groups": TWO_GROUPS,
}


# Two layers of two heads of 128 numbers: by hand, in bytes a token.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("8", 2 * 2 * 2 * (128 + 2 * 2 * 4)),  # 128 bytes, two groups' scale and bias of 4 bytes
        ("4", 2 * 2 * 2 * (64 + 2 * 2 * 4)),
        ("none", 2 * 2 * 2 * 128 * 4),
        ("bf16", 2 * 2 * 2 * 80 * 2),
        ("8 of bf16", 2 * 2 * 2 * (128 + 2 * 2 * 2)),
        ("k and v differ", 2 * 2 * (128 + 2 * 2 * 2 + 80 * 2)),
        ("two groups", 2 * 2 * 2 * (64 + 2 * 2 * 2) + 2 * (80 + 48) * 2),
    ],
)
def test_bytes_per_token(name: str, expected: int) -> None:
    assert SPECS[name].bytes_per_token == expected
    assert SPECS[name].payload_bytes(77) == 77 * expected


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("num_tokens", [1, 3, 255, BLOCK_TOKENS])
def test_tensors_lie_one_after_another_each_aligned_to_its_elements(
    name: str, num_tokens: int
) -> None:
    offset = 0
    for slot in SPECS[name].slots(num_tokens):
        assert slot.offset == offset
        assert slot.offset % NUMPY[slot.dtype].itemsize == 0
        assert slot.nbytes == NUMPY[slot.dtype].itemsize * np.prod(slot.shape)
        assert slot.shape[2] == num_tokens
        offset += slot.nbytes
    assert offset == SPECS[name].payload_bytes(num_tokens)


def test_wider_elements_come_first_and_groups_stay_in_order() -> None:
    slots = [(slot.name, slot.dtype, slot.shape) for slot in TWO_GROUPS.slots(5)]
    assert slots == [
        ("0.k.packed", "U32", (2, 2, 5, 16)),
        ("0.v.packed", "U32", (2, 2, 5, 16)),
        ("0.k.scales", "BF16", (2, 2, 5, 2)),
        ("0.k.biases", "BF16", (2, 2, 5, 2)),
        ("0.v.scales", "BF16", (2, 2, 5, 2)),
        ("0.v.biases", "BF16", (2, 2, 5, 2)),
        ("1.k.dense", "BF16", (1, 2, 5, 80)),
        ("1.v.dense", "BF16", (1, 2, 5, 48)),
    ]


@pytest.mark.parametrize("name", SPECS)
def test_slots_are_views_that_cover_the_payload_without_overlap(name: str) -> None:
    kv = SPECS[name]
    payload = np.zeros(kv.payload_bytes(9), np.uint8)
    for slot in kv.slots(9):
        view = slot.view(payload)
        assert not view.any()  # nobody wrote here before
        view[...] = np.frombuffer(b"\xff" * view.dtype.itemsize, view.dtype)[0]
    assert (payload == 0xFF).all()


def changed(form: TensorFormat, side: str = "k") -> KVSpec:
    base = SPECS["8"].groups[0]
    return spec(replace(base, k=form) if side == "k" else replace(base, v=form))


FACTS: dict[str, Callable[[], KVSpec]] = {
    "weights": lambda: KVSpec(SPECS["8"].groups, "other digest"),
    "bits": lambda: changed(packed(4)),
    "bits of v": lambda: changed(packed(4), "v"),
    "group size": lambda: changed(packed(8, group_size=32)),
    "type": lambda: changed(packed(8, "F16")),
    "dim": lambda: changed(packed(8, dim=64)),
    "heads": lambda: spec(replace(SPECS["8"].groups[0], kv_heads=4)),
    "layers": lambda: spec(replace(SPECS["8"].groups[0], layers=(0,))),
    "order": lambda: spec(replace(SPECS["8"].groups[0], layers=(1, 0))),
    "kind": lambda: spec(replace(SPECS["8"].groups[0], kind="window")),
    "window": lambda: spec(replace(SPECS["8"].groups[0], window=128)),
    "one group more": lambda: spec(*SPECS["8"].groups, group(DENSE_BF16, layers=(2,))),
}


@pytest.mark.requirement("L-41")
@pytest.mark.parametrize("fact", FACTS)
def test_the_fingerprint_changes_with(fact: str) -> None:
    assert FACTS[fact]().fingerprint != SPECS["8"].fingerprint


def test_every_field_of_a_spec_is_among_the_facts() -> None:
    """A field that is added must be added above as well."""
    classes = [TensorFormat.__slots__, LayerGroup.__slots__, StateFormat.__slots__]
    fields = {name for names in [*classes, KVSpec.__dataclass_fields__] for name in names}
    known = {"dim", "dtype", "bits", "group_size", "kind", "layers", "kv_heads", "k", "v"}
    known |= {"layer", "index", "shape"}
    assert fields == known | {"window", "groups", "model_digest", "states"}


@pytest.mark.parametrize("name", ["KV_ABI", "BLOCK_TOKENS"])
def test_the_fingerprint_changes_with_our_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = spec(*SPECS["8"].groups).fingerprint
    assert before == SPECS["8"].fingerprint
    monkeypatch.setattr(kv_spec, name, getattr(kv_spec, name) + 1)
    assert spec(*SPECS["8"].groups).fingerprint != before


STATES = (StateFormat(1, 0, (3, 10), "F16"), StateFormat(1, 1, (2, 4, 4), "F32"))
RECURRENT = KVSpec(TWO_GROUPS.groups, "digest", STATES)


def test_a_checkpoint_holds_states_whatever_its_tokens() -> None:
    states = [(slot.name, slot.shape, slot.offset) for slot in RECURRENT.state_slots]
    assert states == [("1.1", (2, 4, 4), 0), ("1.0", (3, 10), 128)]
    for tokens in ((), (1, 2, 3)):
        point = Block.checkpoint_after(RECURRENT.fingerprint, token_bytes(tokens))
        assert RECURRENT.bytes_of(point) == RECURRENT.state_bytes == 128 + 60
        assert RECURRENT.slots_of(point) == RECURRENT.state_slots
    block = Block.of(RECURRENT.fingerprint, token_bytes((1, 2, 3)))
    assert RECURRENT.bytes_of(block) == TWO_GROUPS.bytes_of(block) == TWO_GROUPS.payload_bytes(3)


@pytest.mark.parametrize("states", [STATES[:1], (STATES[0], replace(STATES[1], shape=(2, 4, 5)))])
def test_the_fingerprint_changes_with_states(states: tuple[StateFormat, ...]) -> None:
    assert KVSpec(TWO_GROUPS.groups, "digest", states).fingerprint != RECURRENT.fingerprint
