"""What only an Apple GPU can show; docs/on-a-mac.md lists it."""

import mlx.core as mx
import numpy as np
import pytest

from tests.conftest import builtin_model

pytestmark = [
    pytest.mark.metal,
    pytest.mark.skipif(not mx.metal.is_available(), reason="needs an Apple GPU"),
]


@pytest.mark.parametrize("kv_bits", [None, 8, 4])
def test_the_self_test_passes_and_decode_reads_packed(kv_bits: int | None) -> None:
    proven = builtin_model(kv_bits).proven
    assert proven.read == "packed"
    assert proven.worst_difference < 0.5


def test_what_numpy_writes_into_an_evaluated_array_the_gpu_sees() -> None:
    """Runs are filled this way; without it every restore would need a second copy."""
    array = mx.zeros((4, 1024))
    mx.eval(array)
    view = np.array(array, copy=False)
    view[2] = 7.0
    del view
    assert float(mx.sum(array[2] * 1.0)) == 7.0 * 1024


def test_appending_to_a_tail_does_not_copy_it() -> None:
    tail = mx.zeros((1, 8, 65536, 64))
    mx.eval(tail)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for i in range(64):
        tail[..., i : i + 1, :] = mx.ones((1, 8, 1, 64))
        mx.eval(tail)
    assert mx.get_peak_memory() - before < tail.nbytes // 2
