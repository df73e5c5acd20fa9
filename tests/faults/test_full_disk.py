"""F4: a disk that is full, really."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from structlog.testing import capture_logs

from agent_memory.block import Block, chain
from agent_memory.kv_spec import KVSpec
from tests.store.conftest import Opener, PayloadOf
from tests.suites import NewSuite, sized

SEED = 40
DISK_BYTES = 4 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own.  Only root may make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or not shutil.which("mount") or subprocess.call(mount):
        pytest.skip("no file system can be made here")
    yield folder
    subprocess.check_call(["umount", "--lazy", str(folder)])


@pytest.mark.requirement("F-04")
@sized(short=2, full=20)
def test_a_full_disk(
    num_cases: int, small_disk: Path, spec: KVSpec, payload_of: PayloadOf, suite: NewSuite
) -> None:
    """Filled by others to the last page, or by the store itself; then there is room again."""
    rng = Random(SEED)
    with suite("F4 disk full", num_cases, SEED) as cases, capture_logs():
        for n in range(num_cases):
            with cases.case(n):
                opener = Opener(small_disk / "state", spec, payload_of)
                kept = chain(spec.fingerprint, range(600))
                store = opener.open()
                assert all(opener.put(*kept))
                store.record("ada", spec.fingerprint, kept)
                filler = small_disk / "filler"
                if n % 2:
                    fill(filler, leaving=rng.randrange(0, 40_000))
                written = write_more_than_fits(opener, n)
                assert store.flush(10)
                there = [block for block in [*kept, *written] if store.find(block.hash)]
                assert all(opener.read(block) for block in there)
                assert len(there) < len(written)
                store.check()

                room(opener, filler)
                more = chain(spec.fingerprint, [n, *range(9000, 9400)])
                assert all(opener.put(*more))
                store.record("ada", spec.fingerprint, more)
                opener.open()
                assert all(opener.read(block) for block in more)
                agent = opener.store.agents.get("ada")
                assert agent is not None and agent.heads[0].chain == tuple(more)
                opener.close()
                shutil.rmtree(opener.path)


def fill(path: Path, leaving: int) -> None:
    free = shutil.disk_usage(path.parent).free
    try:
        path.write_bytes(bytes(max(0, free - leaving)))
    except OSError as error:  # a block was written meanwhile: it is as full as can be
        assert error.errno == errno.ENOSPC


def write_more_than_fits(opener: Opener, name: int) -> list[Block]:
    """Some are written, some are not, and some may go again to make room."""
    spec = opener.spec
    tokens = ([name, n, *range(200)] for n in range(2 * DISK_BYTES // spec.payload_bytes(200)))
    blocks = [chain(spec.fingerprint, some)[0] for some in tokens]
    for block in blocks:
        opener.put(block)
    return blocks


def room(opener: Opener, filler: Path) -> None:
    """As a person would make it: the filler goes, or what can be computed again."""
    if filler.exists():
        filler.unlink()
        return
    for folder in opener.state.block_folders()[:128]:
        for path in folder.iterdir():
            path.unlink()
