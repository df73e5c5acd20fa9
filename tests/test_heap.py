"""What was freed is used again, and goes back to the system when it is told to."""

import subprocess
import sys

import pytest

from agent_memory import heap

PIECES = """
import resource, threading
import numpy as np
from agent_memory import heap

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def use():
    pieces = [np.ones(5 << 20, np.uint8) for _ in range(20)]

def in_a_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

heap.share()
kept = heap.keep(256 << 20)
in_a_thread(use)
before = faults()
in_a_thread(use)
again, held = faults() - before, resident()
heap.give_back()
print(again * resource.getpagesize() >> 20, held - resident() >> 20, kept >> 20)
"""


@pytest.mark.skipif(heap._glibc() is None, reason="another C library")
def test_freed_memory_is_used_again_by_any_thread_until_it_is_given_back() -> None:
    """100 MB in pieces as large as a run's, by one thread after another."""
    command = [sys.executable, "-c", PIECES]
    faulted_mb, given_back_mb, kept_mb = map(int, subprocess.check_output(command).split())
    assert faulted_mb < 10
    assert given_back_mb > 90
    assert kept_mb == 256
