"""What the C library keeps of memory that was freed, to be used again.

On a CPU, MLX and numpy take K and V from the C library's heap, and glibc's way is to give large
pieces back to the system at once and to ask for them again: then every page of a restored run is
fresh, and finding and clearing fresh pages takes several times as long as filling them.  Elsewhere
than on glibc nothing is changed: macOS keeps memory in its own way, and MLX keeps a GPU's.

The numbers are those of glibc's mallopt(3).
"""

import ctypes
from functools import cache

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8
LARGEST = 32 << 20
"""Bytes: mallopt takes no more.  What is larger is a mapping of its own."""


@cache
def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def share() -> None:
    """One heap for all threads, for large pieces too: what one has freed another can use, and the
    heaps of single threads are not kept.  Call it before there are any."""
    if glibc := _glibc():
        glibc.mallopt(ARENA_MAX, 1)
        glibc.mallopt(MMAP_THRESHOLD, LARGEST)


def keep(nbytes: int) -> int:
    """How much may stay at the heap's end when it is freed, from now on -> 0 if it is not ours to
    say."""
    glibc = _glibc()
    return nbytes if glibc and glibc.mallopt(TRIM_THRESHOLD, nbytes) else 0


def give_back() -> None:
    """All that is free goes back to the system, wherever it lies."""
    if glibc := _glibc():
        glibc.malloc_trim(0)
