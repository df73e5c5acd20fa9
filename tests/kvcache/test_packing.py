"""Packing: tokens never mix, and what is read is what is kept."""

import mlx.core as mx
import numpy as np
import pytest

from agent_memory.kv_spec import TensorFormat
from agent_memory.kvcache.packing import choose_format, dense, pack, scores, weighted

DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def random(*shape: int, dtype: mx.Dtype = mx.float32, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8, None])
def test_packing_a_concatenation_is_concatenating_the_packed(
    bits: int | None, dtype: mx.Dtype
) -> None:
    form = choose_format(64, dtype, bits, 32)
    a, b = random(1, 2, 5, 64, dtype=dtype), random(1, 2, 3, 64, dtype=dtype, seed=1)
    whole = pack(mx.concatenate([a, b], axis=2), form)
    pairs = zip(pack(a, form), pack(b, form), strict=True)
    for one, pair in zip(whole, pairs, strict=True):
        assert bool(mx.array_equal(one, mx.concatenate(list(pair), axis=2)))


@pytest.mark.parametrize("bits", [4, 8, None])
def test_packed_shapes_are_those_of_the_format(bits: int | None) -> None:
    form = choose_format(96, mx.bfloat16, bits, 64)
    packed = pack(random(1, 2, 5, 96, dtype=mx.bfloat16), form)
    assert [x.shape[-1] for x in packed] == [width for _, _, width in form.tensors()]


@pytest.mark.parametrize("bits", [4, 8])
def test_dense_gives_back_what_was_packed_to_one_level(bits: int) -> None:
    """Half a level by rounding, and as much by moving the levels so that one of them is zero."""
    form = choose_format(64, mx.float32, bits, 64)
    x = random(1, 2, 50, 64)
    level = (x.max(axis=-1, keepdims=True) - x.min(axis=-1, keepdims=True)) / (2**bits - 1)
    off = mx.abs(dense(pack(x, form), form) - x)
    assert bool((off <= level).all())
    assert float((off / level).mean()) < 0.4


@pytest.mark.parametrize("bits", [4, 8, None])
def test_reading_packed_is_reading_dense(bits: int | None) -> None:
    form = choose_format(64, mx.float32, bits, 32)
    x, q, p = random(1, 2, 40, 64), random(1, 2, 3, 64, seed=1), random(1, 2, 3, 40, seed=2)
    packed = pack(x, form)
    whole = dense(packed, form)
    np.testing.assert_allclose(
        scores(q, packed, form), np.array(q @ whole.swapaxes(-1, -2)), atol=1e-4
    )
    np.testing.assert_allclose(weighted(p, packed, form), np.array(p @ whole), atol=1e-4)


@pytest.mark.parametrize(
    ("dim", "bits", "wanted", "group"),
    [
        (128, 8, 128, 128),
        (128, 8, 64, 64),
        (64, 4, 128, 64),  # the largest that divides
        (96, 8, 64, 32),
        (80, 8, 64, None),  # nothing divides: dense
        (48, 4, 32, None),
        (128, None, 64, None),
    ],
)
def test_a_group_that_fits_or_dense(
    dim: int, bits: int | None, wanted: int, group: int | None
) -> None:
    form = choose_format(dim, mx.float32, bits, wanted)
    expected = TensorFormat(dim, "F32", bits, group) if group else TensorFormat(dim, "F32")
    assert form == expected
