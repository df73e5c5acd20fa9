"""A tail grows in place: an append costs what is appended."""

import mlx.core as mx
import numpy as np
import pytest

from agent_memory.block import BLOCK_TOKENS
from agent_memory.kvcache.tail import Part, Tail

TOKENS = 4096
STEPS = 200


def rows(count: int, value: float) -> tuple[mx.array]:
    return (mx.full((1, 4, count, 64), value),)


def filled(reserve: int) -> Tail:
    tail = Tail(0, reserve)
    tail.append(rows(TOKENS, 0.0), rows(TOKENS, 0.5))
    mx.eval(tail.part())
    return tail


def peak_of_appends(tail: Tail, kept: list[Part]) -> int:
    """Bytes above the start at the worst moment of 200 steps that append, read and move on."""
    mx.synchronize()
    mx.reset_peak_memory()
    start = mx.get_active_memory()
    for step in range(STEPS):
        tail.append(rows(1, step), rows(1, -step))
        part = tail.part()
        mx.eval(part.k[0].sum(), part.v[0].sum())
        kept[:] = [part] if kept else []
        del part
    return int(mx.get_peak_memory() - start)


def test_appending_does_not_copy_the_tail() -> None:
    tail = filled(TOKENS + STEPS)
    one_side = tail.nbytes // 2
    assert peak_of_appends(tail, kept=[]) < one_side // 8
    np.testing.assert_array_equal(tail.part().k[0][0, 0, TOKENS:, 0], np.arange(STEPS))


def test_the_measure_sees_the_copy_that_a_kept_view_causes() -> None:
    tail = filled(TOKENS + STEPS)
    one_side = tail.nbytes // 2
    assert peak_of_appends(tail, kept=[tail.part()]) > one_side // 2


def test_the_reserve_is_allocated_once() -> None:
    tail = Tail(0, reserve=1000)
    tail.append(rows(3, 1.0), rows(3, 1.0))
    size = tail.nbytes
    for _ in range(5):
        tail.append(rows(199, 1.0), rows(199, 1.0))
    assert tail.used == 998 and tail.nbytes == size == 2 * 1024 * 4 * 64 * 4


def test_without_a_reserve_it_grows_seldom_and_in_whole_blocks() -> None:
    tail, sizes = Tail(0, 0), set()
    for _ in range(20 * BLOCK_TOKENS):
        tail.append((mx.ones((1, 1, 1, 2)),), (mx.ones((1, 1, 1, 2)),))
        sizes.add(tail.nbytes // (2 * 2 * 4))
    assert all(size % BLOCK_TOKENS == 0 for size in sizes)
    assert len(sizes) < 13
    assert max(sizes) <= 1.25 * 20 * BLOCK_TOKENS + BLOCK_TOKENS


@pytest.mark.parametrize("pieces", [[700], [1] * 300, [255, 1, 1], [256, 300, 5]])
def test_what_was_appended_is_there_in_order(pieces: list[int]) -> None:
    tail, values = Tail(40, 0), mx.arange(sum(pieces), dtype=mx.float32)
    at = 0
    for count in pieces:
        x = values[at : at + count].reshape(1, 1, count, 1)
        tail.append((x,), (x + 0.5, -x))
        at += count
    part = tail.part()
    assert (part.start, part.end, len(part.k), len(part.v)) == (40, 40 + at, 1, 2)
    np.testing.assert_array_equal(part.k[0].flatten(), np.arange(at))
    np.testing.assert_array_equal(part.v[0].flatten(), np.arange(at) + 0.5)
    np.testing.assert_array_equal(part.v[1].flatten(), -np.arange(at))


@pytest.mark.parametrize(
    ("lo", "hi", "start", "end"), [(0, 99, 40, 50), (42, 45, 42, 45), (0, 41, 40, 41)]
)
def test_a_cut_is_what_lies_within(lo: int, hi: int, start: int, end: int) -> None:
    tail, x = Tail(40, 0), mx.arange(10).reshape(1, 1, 10, 1)
    tail.append((x,), (x,))
    cut = tail.part().cut(lo, hi)
    assert (cut.start, cut.end) == (start, end)
    np.testing.assert_array_equal(cut.v[0].flatten(), np.arange(start - 40, end - 40))
