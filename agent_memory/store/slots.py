"""Memory that block files are read into, used again when nothing refers to it any more.

Fresh memory costs several times what reading a file into it does: the system has to find and clear
every page.  So room for some full blocks of the serving model is made ready while there is nothing
to read, and a slot comes back when the last array over it is gone, whoever held it.  Those that are
wanted no more go back to the system at once: each is a mapping of its own, for a heap may keep what
was freed.  Knows nothing of files.  Any thread.
"""

import ctypes
import mmap
import weakref
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue

import numpy as np

from agent_memory.store.files import Bytes

FIRST_BYTES = 64 << 20
AT_ONCE_BYTES = 1 << 20
"""Touching fresh memory slows every thread that computes: little of it, and little at once."""


@dataclass(frozen=True, slots=True)
class Spare:
    """Slots of one size that nobody uses, `most` of them or a few more."""

    nbytes: int
    most: int
    slots: SimpleQueue[Bytes]

    @property
    def full(self) -> bool:
        return self.slots.qsize() >= self.most


class Slots:
    def __init__(self) -> None:
        # Replaced as one.  A SimpleQueue may be put to while it is taken from by the same thread,
        # as finalizers do.
        self._spare = Spare(0, 0, SimpleQueue())
        self._in_use = False

    @property
    def num_spare(self) -> int:
        return self._spare.slots.qsize()

    def resize(self, nbytes: int, spare_bytes: int) -> None:
        """Slots are of `nbytes` from now on; there are none yet, and as many as fit are wanted:
        some at once, the rest when the first have been of use."""
        self._spare = Spare(nbytes, spare_bytes // nbytes, SimpleQueue())
        self._in_use = False

    @property
    def wants_more(self) -> bool:
        spare = self._spare
        first = self.num_spare * spare.nbytes >= FIRST_BYTES
        return not spare.full and (self._in_use or not first)

    @property
    def step_bytes(self) -> int:
        """What the next `add` makes ready."""
        return max(AT_ONCE_BYTES, self._spare.nbytes)

    def add(self) -> None:
        """Make some more ready; no more are wanted when there is no memory."""
        spare = self._spare
        for _ in range(self.step_bytes // spare.nbytes):
            if not self.wants_more:
                return
            try:
                slot = _mapped(spare.nbytes)
            except OSError:
                self._spare = replace(spare, most=0)
                return
            slot.fill(1)  # touched
            spare.slots.put(slot)

    def take(self, nbytes: int) -> Bytes:
        """An array of so many bytes, of any content; a slot only if it has just that size."""
        spare = self._spare
        if nbytes != spare.nbytes:
            return np.empty(nbytes, np.uint8)
        self._in_use = True
        try:
            slot = spare.slots.get_nowait()
        except Empty:
            slot = _mapped(nbytes)
        # Every view of the array leads back to this owner, so it dies after the last of them.
        owner = (ctypes.c_uint8 * nbytes).from_buffer(slot.data)
        weakref.finalize(owner, self._give_back, slot).atexit = False
        return np.frombuffer(memoryview(owner), np.uint8)

    def _give_back(self, slot: Bytes) -> None:
        spare = self._spare  # not that of then: one array would keep all of its slots
        if slot.nbytes == spare.nbytes and not spare.full:
            spare.slots.put(slot)


def _mapped(nbytes: int) -> Bytes:
    """Raises OSError when there is no memory."""
    return np.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON), np.uint8)
