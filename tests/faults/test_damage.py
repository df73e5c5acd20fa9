"""F5, F6, F7: files that are not what they were.  Each is refused, or is what it was."""

import os
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
from structlog.testing import capture_logs

from agent_memory.block import Block, chain
from agent_memory.kv_spec import KVSpec
from agent_memory.store.format import Rejected, decode, identify
from tests.faults.crash import Tree
from tests.faults.damage import BLOCK_FILE, INDEX
from tests.faults.disk import Disk
from tests.store.conftest import Opener, PayloadOf
from tests.suites import NewSuite, sized

SEED = 50
MOST_GROWTH_BYTES = 50 << 20


def peak_bytes() -> int:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used << 10


@pytest.fixture
def fast(fast_folder: Path, spec: KVSpec, payload_of: PayloadOf) -> Opener:
    return Opener(fast_folder / "state", spec, payload_of)


@sized(short=200, full=10_000)
def test_damaged_block_files(num_cases: int, fast: Opener, suite: NewSuite) -> None:
    """Read where the index knows the file; then again as a file that a start has found."""
    rng, spec = Random(SEED), fast.spec
    blocks = [chain(spec.fingerprint, [n, *range(n % 9, 30 * n)])[0] for n in range(20)]
    fast.open()
    assert all(fast.put(*blocks))
    peak = 0
    with suite("F5 damaged block files", num_cases, SEED) as cases, capture_logs():
        for n in range(num_cases):
            block, damage = blocks[n % len(blocks)], rng.choice(BLOCK_FILE)
            with cases.case((n, damage.__name__)):
                path = fast.file(block)
                good = path.read_bytes()
                raw = bytearray(good)
                damage(raw, rng)
                path.write_bytes(raw)
                assert fast.read(block) == (raw == good)
                found_is_refused(raw, block, fast)
                assert fast.put(block) == [True]
            if n % 100 == 0:
                shutil.rmtree(fast.path / "quarantine")
                (fast.path / "quarantine").mkdir()
                peak = peak or peak_bytes()
        assert peak_bytes() - peak < MOST_GROWTH_BYTES
    assert all(fast.read(block) for block in blocks)
    fast.close()


def found_is_refused(raw: bytearray, block: Block, opener: Opener) -> None:
    """Or is the block that was damaged; or is of another model, and refused when it is read."""
    data = np.frombuffer(bytes(raw), np.uint8)
    try:
        file = identify(data)
        payload = decode(data, file, opener.spec)
    except Rejected:
        return
    assert file.block == block
    np.testing.assert_array_equal(payload, opener.payload_of(block))
