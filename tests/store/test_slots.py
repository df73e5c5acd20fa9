"""Memory is given out again only when nothing refers to it."""

import os

import numpy as np

from agent_memory.processes import output
from agent_memory.store.slots import Slots

MB = 1 << 20


def resident_bytes() -> int:
    return 1024 * int(output("ps", "-o", "rss=", "-p", str(os.getpid())))


def ready(nbytes: int, count: int) -> Slots:
    slots = Slots()
    slots.resize(nbytes, nbytes * count)
    while slots.wants_more:
        slots.add()
    return slots


def test_a_slot_comes_back_when_its_last_view_is_gone() -> None:
    slots = ready(4096, 2)
    array = slots.take(4096)
    view = array[100:200].view(np.uint8)
    other = array.data[5:]
    assert slots.num_spare == 1
    del array
    assert slots.num_spare == 1
    del view
    assert slots.num_spare == 1
    del other
    assert slots.num_spare == 2


def test_no_two_arrays_share_memory() -> None:
    slots = ready(4096, 2)
    arrays = [slots.take(4096) for _ in range(5)]
    for n, array in enumerate(arrays):
        array[:] = n
    assert [set(array.tolist()) for array in arrays] == [{n} for n in range(5)]


def test_other_sizes_are_plain_arrays() -> None:
    slots = ready(4096, 2)
    assert slots.take(4095).nbytes == 4095 and slots.take(5000).nbytes == 5000
    assert slots.num_spare == 2


def test_slots_of_the_size_before_are_not_given_out() -> None:
    slots = ready(4096, 2)
    old = slots.take(4096)
    slots.resize(8192, 8192)
    del old
    assert slots.num_spare == 0
    assert slots.take(8192).nbytes == 8192


def test_what_was_ready_for_another_model_is_the_systems_again() -> None:
    slots = ready(MB, 48)
    held, before = slots.take(MB), resident_bytes()
    slots.resize(2 * MB, 2 * MB)
    assert before - resident_bytes() > 40 * MB
    held[:] = 1  # its own memory is still there
