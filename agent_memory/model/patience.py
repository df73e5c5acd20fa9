"""A limit of time for Python that somebody else wrote, such as a model's chat template.

Threads cannot be ended from outside, but an exception can be raised in one between two steps of
Python.  Any thread.
"""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class OutOfPatience(BaseException):
    """Not an Exception: nobody's `except Exception` shall swallow it."""


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Raises OutOfPatience where the body takes longer, at its next step in Python."""
    thread, lock, over = threading.get_ident(), threading.Lock(), False

    def interrupt() -> None:
        with lock:
            if not over:
                _raise_in(thread, OutOfPatience)

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            over = True
            _raise_in(thread, None)  # what has been raised and not yet come
        timer.cancel()


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    raised = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)
