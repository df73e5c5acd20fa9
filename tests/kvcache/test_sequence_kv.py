"""Copied out, put together as a run and copied out again: every byte stays what it was."""

import mlx.core as mx
import numpy as np
import pytest

from agent_memory.kv_spec import KVSpec
from agent_memory.kvcache.sequence_kv import SequenceKV
from tests.kvcache.kv import BITS, Payload, append, run_of, small_spec

SPECS = {f"kv{bits or 'none'}": small_spec(bits) for bits in BITS}
SPECS |= {f"kv{bits or 'none'} bf16": small_spec(bits, mx.bfloat16) for bits in BITS}


@pytest.fixture(params=SPECS)
def spec(request: pytest.FixtureRequest) -> KVSpec:
    return SPECS[request.param]


def together(spec: KVSpec, payloads: list[tuple[int, Payload]]) -> Payload:
    """The payload of the concatenation, made with numpy alone."""
    total = sum(count for count, _ in payloads)
    out = np.empty(spec.payload_bytes(total), np.uint8)
    for i, slot in enumerate(spec.slots(total)):
        parts = [spec.slots(count)[i].view(payload) for count, payload in payloads]
        slot.view(out)[...] = np.concatenate(parts, axis=2)
    return out


def test_a_payload_is_the_bytes_of_k_and_v(spec: KVSpec) -> None:
    kv = SequenceKV(spec)
    append(kv, 5, seed=1)
    payload = kv.copy_out(1, 4)
    for slot in spec.slots(3):
        g, side, name = slot.name.split(".")
        group = spec.groups[int(g)]
        form = getattr(group, side)
        index = [tensor for tensor, _, _ in form.tensors()].index(name)
        for i, layer in enumerate(group.layers):
            (part,) = kv.parts(layer)
            kept = getattr(part, side)[index][0, :, 1:4]
            raw = kept.view(mx.uint16) if kept.dtype == mx.bfloat16 else kept
            np.testing.assert_array_equal(slot.view(payload)[i], np.array(raw))


def test_payload_of_a_and_b_is_their_payloads_concatenated(spec: KVSpec) -> None:
    kv = SequenceKV(spec)
    for count in (7, 1, 1, 20):
        append(kv, count, seed=2)
    cuts = [0, 3, 4, 9, 29]
    pieces = [(hi - lo, kv.copy_out(lo, hi)) for lo, hi in zip(cuts, cuts[1:], strict=False)]
    np.testing.assert_array_equal(together(spec, pieces), kv.copy_out(0, 29))


@pytest.mark.requirement("B-17")
def test_restored_is_byte_for_byte_what_was_computed(spec: KVSpec) -> None:
    """Out of blocks, the last of which only partly fits, into a run; then on in a tail."""
    first = SequenceKV(spec)
    append(first, 24, seed=3)
    blocks = [(0, 8, 8, first.copy_out(0, 8)), (8, 8, 8, first.copy_out(8, 16))]
    partly = (16, 5, 8, first.copy_out(16, 24))

    second = SequenceKV(spec, run_of(spec, [*blocks, partly], 21), reserve=30)
    append(second, 3, seed=3)
    assert second.length == 24
    second.check()
    for lo, hi in [(0, 24), (0, 21), (21, 24), (20, 22), (3, 5), (22, 23), (7, 9)]:
        np.testing.assert_array_equal(second.copy_out(lo, hi), first.copy_out(lo, hi))


def test_blocks_may_land_in_any_order(spec: KVSpec) -> None:
    kv = SequenceKV(spec)
    append(kv, 12, seed=4)
    spans = [(at, 4, 4, kv.copy_out(at, at + 4)) for at in (0, 4, 8)]
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        again = SequenceKV(spec, run_of(spec, [spans[i] for i in order], 12))
        np.testing.assert_array_equal(again.copy_out(0, 12), kv.copy_out(0, 12))


def test_sequences_share_a_run_and_never_write_to_it(spec: KVSpec) -> None:
    kv = SequenceKV(spec)
    append(kv, 8, seed=6)
    run = run_of(spec, [(0, 8, 8, kv.copy_out(0, 8))], 8)
    one, other = SequenceKV(spec, run), SequenceKV(spec, run)
    append(one, 5, seed=7)
    append(other, 3, seed=8)
    before = kv.copy_out(0, 8)
    for sharer in (one, other):
        assert sharer.parts(0)[0] is run.parts[0]
        np.testing.assert_array_equal(sharer.copy_out(0, 8), before)
    assert not np.array_equal(one.copy_out(8, 11), other.copy_out(8, 11))


def test_a_short_run_is_copied_to_the_tail(spec: KVSpec) -> None:
    kv = SequenceKV(spec)
    append(kv, 12, seed=6)
    run = run_of(spec, [(0, 8, 8, kv.copy_out(0, 8))], 8)
    copied = SequenceKV(spec, run, reserve=20, copied=True)
    assert copied.length == 8 and copied.run is None
    copied.check()
    append(copied, 5, seed=7)
    for layer in copied.tails:
        assert len(copied.parts(layer)) == 1
    np.testing.assert_array_equal(copied.copy_out(0, 8), kv.copy_out(0, 8))
    again = SequenceKV(spec, run)  # the run is as it was
    np.testing.assert_array_equal(again.copy_out(0, 8), kv.copy_out(0, 8))


def test_a_payload_is_a_copy(spec: KVSpec) -> None:
    kv = SequenceKV(spec)
    append(kv, 4, seed=9)
    payload = kv.copy_out(0, 4)
    kept = payload.copy()
    append(kv, 600, seed=9)
    np.testing.assert_array_equal(payload, kept)
    payload[...] = 0
    np.testing.assert_array_equal(kv.copy_out(0, 4), kept)


@pytest.mark.parametrize(("lo", "hi"), [(0, 0), (3, 2), (0, 5), (-1, 2)])
def test_only_what_is_there_can_be_copied_out(lo: int, hi: int) -> None:
    kv = SequenceKV(SPECS["kv8"])
    append(kv, 4, seed=10)
    with pytest.raises(AssertionError):
        kv.copy_out(lo, hi)
