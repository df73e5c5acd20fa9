"""Memory that block files are read into, used again when nothing refers to it any more.

Fresh memory costs several times what reading a file into it does: the system has to find and clear
every page.  So room for some full blocks of the serving model is made ready before it is needed,
and a slot comes back when the last array over it is gone, whoever held it.  Knows nothing of files.
Any thread.
"""

import ctypes
import weakref
from queue import Empty, SimpleQueue

import numpy as np

from agent_memory.store.files import Bytes

SPARE_BYTES = 64 << 20


class Slots:
    def __init__(self) -> None:
        # Replaced as one when the size changes.  A SimpleQueue may be put to while it is taken from
        # by the same thread, as finalizers do.
        self._spare: tuple[int, SimpleQueue[bytearray]] = (0, SimpleQueue())

    @property
    def num_spare(self) -> int:
        return self._spare[1].qsize()

    def prepare(self, nbytes: int, spare_bytes: int = SPARE_BYTES) -> None:
        """Have memory ready, touched, for as many arrays of `nbytes` as fit into `spare_bytes`."""
        ready: SimpleQueue[bytearray] = SimpleQueue()
        for _ in range(spare_bytes // nbytes):
            ready.put(bytearray(b"\1") * nbytes)
        self._spare = nbytes, ready

    def take(self, nbytes: int) -> Bytes:
        """An array of so many bytes, of any content; a slot only if it has just that size."""
        size, spare = self._spare
        if nbytes != size:
            return np.empty(nbytes, np.uint8)
        try:
            slot = spare.get_nowait()
        except Empty:
            slot = bytearray(size)
        # Every view of the array leads back to this owner, so it dies after the last of them.
        owner = (ctypes.c_uint8 * nbytes).from_buffer(slot)
        weakref.finalize(owner, _give_back, slot, spare, SPARE_BYTES // size).atexit = False
        return np.frombuffer(memoryview(owner), np.uint8)


def _give_back(slot: bytearray, spare: SimpleQueue[bytearray], most: int) -> None:
    if spare.qsize() < most:
        spare.put(slot)
