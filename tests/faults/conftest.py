"""The store's own fixtures, and folders in memory."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_memory.kv_spec import KVSpec
from tests.faults.stories import Crashes
from tests.store.conftest import PayloadOf, opener, payload_of, spec

__all__ = ["opener", "payload_of", "spec"]

_IN_MEMORY = Path("/dev/shm")


@pytest.fixture
def fast_folder(tmp_path: Path) -> Iterator[Path]:
    """Where forcing to disk costs nothing, if there is such a place.  For suites that cut the
    power themselves."""
    if not _IN_MEMORY.is_dir():
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="agent-memory-", dir=_IN_MEMORY))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def crashes(fast_folder: Path, spec: KVSpec, payload_of: PayloadOf) -> Crashes:
    return Crashes(fast_folder, spec, payload_of)
