"""Attention over run + tail against the textbook's formula, in float64, over the kept K and V."""

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from mlx_lm.models import base, llama

from agent_memory.errors import ModelRefused
from agent_memory.kv_spec import KVSpec
from agent_memory.kvcache.attention import ATTENTION, Dispatch, Member, Read, Rows, install, merge
from agent_memory.kvcache.packing import dense
from agent_memory.kvcache.sequence_kv import SequenceKV
from tests.kvcache.kv import BITS, append, run_of, small_spec
from tests.model import tiny

Array = npt.NDArray[np.float64]

SCALE = 0.125
HEADS = 6  # query heads; the specs have 2 and 1 KV heads
READS: list[Read] = ["packed", "dense"]


def sequence(spec: KVSpec, run: int, tail: int, seed: int) -> SequenceKV:
    kv = SequenceKV(spec)
    if run:
        append(kv, run, seed)
        kv = SequenceKV(spec, run_of(spec, [(0, run, run, kv.copy_out(0, run))], run))
    if tail:
        append(kv, tail, seed)
    return kv


def textbook(q: Array, kv: SequenceKV, layer: int) -> Array:
    """q [rows, heads, dim], the last rows of the sequence -> [rows, heads, v_dim]."""
    group = next(g for g in kv.spec.groups if layer in g.layers)
    parts = kv.parts(layer)
    k, v = (
        np.concatenate(
            [np.array(dense(getattr(p, side), getattr(group, side)), np.float64) for p in parts],
            axis=2,
        )[0]
        for side in ("k", "v")
    )
    num_rows, heads, _ = q.shape
    out = np.empty((num_rows, heads, v.shape[-1]))
    for row in range(num_rows):
        end = k.shape[1] - num_rows + row + 1
        for head in range(heads):
            kv_head = head * group.kv_heads // heads
            s = k[kv_head, :end] @ q[row, head] * SCALE
            w = np.exp(s - s.max())
            out[row, head] = (w / w.sum()) @ v[kv_head, :end]
    return out


# (run, tail, rows): decode rows first.
STEPS = {
    "one decode row": [(0, 9, 1)],
    "a first token": [(0, 1, 1)],
    "decode from a run": [(12, 3, 1)],
    "a chunk": [(0, 7, 7)],
    "a chunk after a run": [(12, 5, 5)],
    "a chunk after a run and a tail": [(12, 9, 5)],
    "mixed": [(0, 9, 1), (12, 1, 1), (3, 40, 1), (0, 6, 6), (12, 8, 4)],
}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("step", STEPS)
def test_each_row_attends_to_its_own_sequence_up_to_itself(
    step: str, read: Read, layer: int, bits: int | None
) -> None:
    spec = small_spec(bits)
    group = next(g for g in spec.groups if layer in g.layers)
    kvs = [sequence(spec, run, tail, seed) for seed, (run, tail, _) in enumerate(STEPS[step])]
    counts = [rows for *_, rows in STEPS[step]]
    total, num_padding = sum(counts), 3
    q = mx.random.normal((total + num_padding, HEADS, 1, group.k.dim), key=mx.random.key(9))
    members = [Member(kv, count, count) for kv, count in zip(kvs, counts, strict=True)]
    rows = Rows(layer, group, members, mx.zeros(total + num_padding), read)
    out = np.array(rows.attend(q, SCALE))
    assert out.shape == (total + num_padding, HEADS, 1, group.v.dim)
    at = 0
    for kv, count in zip(kvs, counts, strict=True):
        expected = textbook(np.array(q[at : at + count, :, 0], np.float64), kv, layer)
        np.testing.assert_allclose(out[at : at + count, :, 0], expected, atol=1e-5)
        at += count


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("num_sharing", [2, 9])
def test_rows_that_share_a_run_attend_as_each_alone(
    num_sharing: int, read: Read, layer: int, bits: int | None
) -> None:
    """Beside rows with runs of their own, two sharing another, and a chunk after the same run."""
    spec = small_spec(bits)
    group = next(g for g in spec.groups if layer in g.layers)
    own = [sequence(spec, 12, 3, seed) for seed in range(2)]
    runs = [own[0].run, sequence(spec, 7, 1, 5).run]
    kvs = [SequenceKV(spec, runs[0]) for _ in range(num_sharing)]
    kvs += [SequenceKV(spec, runs[1]) for _ in range(2)]
    for seed, kv in enumerate(kvs):
        append(kv, 1 + seed % 3, seed)
    chunk = SequenceKV(spec, runs[0])
    append(chunk, 5, 77)
    kvs = [own[1], *kvs[1::2], own[0], *kvs[::2], chunk]
    counts = [1] * (len(kvs) - 1) + [4]
    q = mx.random.normal((sum(counts), HEADS, 1, group.k.dim), key=mx.random.key(9))
    members = [Member(kv, count, count) for kv, count in zip(kvs, counts, strict=True)]
    out = np.array(Rows(layer, group, members, mx.zeros(sum(counts)), read).attend(q, SCALE))
    at = 0
    for kv, count in zip(kvs, counts, strict=True):
        expected = textbook(np.array(q[at : at + count, :, 0], np.float64), kv, layer)
        np.testing.assert_allclose(out[at : at + count, :, 0], expected, atol=1e-5)
        at += count


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("read", READS)
def test_the_last_layer_computes_what_is_wanted_and_only_that(read: Read, bits: int | None) -> None:
    spec = small_spec(bits)
    group = spec.groups[0]
    kvs = [sequence(spec, run, tail, seed) for seed, (run, tail, _) in enumerate(STEPS["mixed"])]
    counts, wanted = [rows for *_, rows in STEPS["mixed"]], [1, 1, 0, 2, 0]
    q = mx.random.normal((sum(counts), HEADS, 1, group.k.dim), key=mx.random.key(9))
    members = [Member(*member) for member in zip(kvs, counts, wanted, strict=True)]
    every = Rows(0, group, members, mx.zeros(sum(counts)), read).attend(q, SCALE)
    some = Rows(0, group, members, mx.zeros(sum(counts)), read, is_last=True).attend(q, SCALE)
    assert some.shape == every.shape
    ends = np.cumsum(counts)
    kept = [row for end, n in zip(ends, wanted, strict=True) for row in range(end - n, end)]
    np.testing.assert_allclose(np.array(some)[kept], np.array(every)[kept], atol=1e-5)
    dropped = [row for row in range(sum(counts)) if row not in kept]
    assert not np.array(some)[dropped].any()


@pytest.mark.parametrize("bits", BITS)
def test_k_and_v_of_a_step_go_to_their_own_sequences(bits: int | None) -> None:
    """Rows appended together are kept as if each sequence had been alone."""
    spec = small_spec(bits)
    group = spec.groups[0]
    counts = [1, 1, 4, 2]
    k, v = (mx.random.normal((9, 2, 1, 64), key=mx.random.key(i)) for i in range(2))
    together = [SequenceKV(spec) for _ in counts]
    members = [Member(kv, count, count) for kv, count in zip(together, counts, strict=True)]
    for layer in group.layers:
        Rows(layer, group, members, mx.zeros(9), "packed").update_and_fetch(k, v)
    at = 0
    for kv, count in zip(together, counts, strict=True):
        alone = SequenceKV(spec)
        for row in range(at, at + count):
            one = [x[row : row + 1] for x in (k, v)]
            Rows(0, group, [Member(alone, 1, 1)], mx.zeros(1), "packed").update_and_fetch(*one)
        ours, theirs = kv.parts(0)[0], alone.parts(0)[0]
        for a, b in zip(ours.k + ours.v, theirs.k + theirs.v, strict=True):
            assert bool(mx.array_equal(a, b))
        at += count


def test_merging_parts_is_attending_to_all_at_once() -> None:
    s = mx.random.normal((1, 2, 3, 10), key=mx.random.key(0)) * 30  # far apart: weights near zero
    v = mx.random.normal((1, 2, 10, 4), key=mx.random.key(1))
    whole = mx.softmax(s, axis=-1) @ v
    parts = []
    for lo, hi in [(0, 1), (1, 6), (6, 10)]:
        piece = s[..., lo:hi]
        lse = mx.logsumexp(piece, axis=-1, keepdims=True)
        parts.append((mx.exp(piece - lse) @ v[..., lo:hi, :], lse))
    np.testing.assert_allclose(merge(parts), whole, atol=1e-5)


def test_calls_that_are_not_ours_go_to_the_original() -> None:
    model = tiny.build("llama")
    before = model(mx.array([[1, 2, 3]]))
    assert llama.__name__ in install(model)
    dispatch = getattr(llama, ATTENTION)
    assert isinstance(dispatch, Dispatch)
    install(model)
    assert getattr(llama, ATTENTION) is dispatch  # once is enough
    assert isinstance(dispatch.original, type(base.create_causal_mask))
    assert bool(mx.array_equal(model(mx.array([[1, 2, 3]])), before))


def test_what_is_not_computed_here_is_refused_not_ignored() -> None:
    spec = small_spec(None)
    kv = sequence(spec, 0, 3, 0)
    rows = Rows(0, spec.groups[0], [Member(kv, 1, 1)], mx.zeros(1), "packed")
    dispatch = Dispatch(base.scaled_dot_product_attention)
    q = mx.zeros((1, HEADS, 1, 64))
    assert dispatch(q, rows, rows, scale=SCALE).shape == (1, HEADS, 1, 64)
    with pytest.raises(ModelRefused, match="masks"):
        dispatch(q, rows, rows, scale=SCALE, mask=mx.zeros((1, 3)))
    with pytest.raises(ModelRefused, match="last 4 tokens"):
        rows.make_mask(1, window_size=4, return_array=False)


@pytest.mark.parametrize("bits", [8, 4])
def test_read_dense_nothing_is_read_packed(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kernels misread packed KV no row may use them, whatever it shares with others."""

    def misread(*_: object, **__: object) -> mx.array:
        raise AssertionError("read packed")

    spec = small_spec(bits)
    first = sequence(spec, 12, 3, 0)
    kvs = [first, *(SequenceKV(spec, first.run) for _ in range(2)), sequence(spec, 7, 2, 5)]
    for seed, kv in enumerate(kvs):
        append(kv, 1, seed)
    q = mx.random.normal((len(kvs), HEADS, 1, 64), key=mx.random.key(9))
    rows = Rows(0, spec.groups[0], [Member(kv, 1, 1) for kv in kvs], mx.zeros(len(kvs)), "dense")
    monkeypatch.setattr(mx, "quantized_matmul", misread)
    mx.eval(rows.attend(q, SCALE))
