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


@pytest.mark.requirement("F-05")
@sized(short=200, full=10_000)
def test_damaged_block_files(num_cases: int, fast: Opener, suite: NewSuite) -> None:
    """Read where the index knows the file; then again as a file that a start has found."""
    rng, spec = Random(SEED), fast.spec
    blocks = [chain(spec.fingerprint, [n, *range(n % 9, 30 * n)])[0] for n in range(20)]
    for n in range(0, 20, 4):
        blocks[n] = Block.checkpoint_after(spec.fingerprint, blocks[n].tokens[: 60 * n])
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


def gone(path: str, other: bytes) -> None:
    os.unlink(path)


def another_block(path: str, other: bytes) -> None:
    _replace(path, other)


def rewritten(path: str, other: bytes) -> None:
    """In place, under the reader's eyes."""
    Path(path).write_bytes(other)


def shorter(path: str, other: bytes) -> None:
    os.truncate(path, 3000)


def longer(path: str, other: bytes) -> None:
    os.truncate(path, 1 << 20)


def shut(path: str, other: bytes) -> None:
    os.chmod(path, 0)


def a_folder(path: str, other: bytes) -> None:
    os.unlink(path)
    os.mkdir(path)


def a_link(path: str, other: bytes) -> None:
    os.rename(path, path + ".kept")
    os.symlink(path + ".kept", path)


def a_pipe(path: str, other: bytes) -> None:
    os.unlink(path)
    os.mkfifo(path)


def _replace(path: str, data: bytes) -> None:
    Path(path + ".new").write_bytes(data)
    os.replace(path + ".new", path)


SWITCHES = [gone, another_block, rewritten, shorter, longer, shut, a_folder, a_link, a_pipe]


class Switch:
    """Changes the file just before the reader's first operation of one kind on it."""

    def __init__(self, opener: Opener, block: Block, moment: str, change: Callable[..., None]):
        self.path = str(opener.file(block).relative_to(opener.path))
        self.moment, self.change = moment, change
        self.whole = str(opener.file(block))
        self.other = opener.file(block).read_bytes()[:-1] + b"?"
        self.done = False

    def __call__(self, kind: str, path: str) -> None:
        if not self.done and (kind, path) == (self.moment, self.path):
            self.done = True
            self.change(self.whole, self.other)


@pytest.mark.requirement("F-06")
@sized(short=27, full=200)
def test_switched_while_it_is_read(num_cases: int, fast: Opener, suite: NewSuite) -> None:
    rng, spec = Random(SEED), fast.spec
    block = chain(spec.fingerprint, range(200))[0]
    combinations = [(moment, change) for moment in ("look", "open", "read") for change in SWITCHES]
    rng.shuffle(combinations)
    with suite("F6 switched while it is read", num_cases, SEED) as cases, capture_logs():
        for n in range(num_cases):
            moment, change = combinations[n % len(combinations)]
            with cases.case((moment, change.__name__)):
                fast.open()
                fast.put(block)
                with Disk(fast.path).watched() as disk:
                    switch = Switch(fast, block, moment, change)
                    disk.fault = switch
                    fast.read(block)
                    disk.fault = lambda kind, path: None
                assert switch.done
                fast.read(block)  # what is there now, if it was read before the change
                assert fast.put(block) == [True] and fast.read(block)
                fast.close()
                shutil.rmtree(fast.path)


@pytest.fixture
def indexed(fast: Opener) -> tuple[Opener, Tree, list[Block]]:
    """A store whose index is partly in its log still, as a killed process leaves it."""
    blocks = chain(fast.spec.fingerprint, range(700))
    others = chain(fast.spec.fingerprint, range(5000, 5300))
    store = fast.open()
    fast.put(*blocks)
    store.record("ada", fast.spec.fingerprint, blocks)
    fast.open()
    fast.put(*others)
    fast.store.record("ben", fast.spec.fingerprint, others)
    assert fast.store.flush(10)
    tree = Tree.of(fast.path)
    fast.close()
    shutil.rmtree(fast.path)
    return fast, tree, [*blocks, *others]


@pytest.mark.requirement("F-07")
@sized(short=60, full=1000)
def test_damaged_index(
    num_cases: int, indexed: tuple[Opener, Tree, list[Block]], suite: NewSuite
) -> None:
    opener, tree, blocks = indexed
    rng = Random(SEED)
    with suite("F7 damaged index", num_cases, SEED) as cases, capture_logs():
        for n in range(num_cases):
            damage, name = rng.choice(INDEX), rng.choice(["index.db", "index.db-wal"])
            with cases.case((n, damage.__name__, name)):
                raw = bytearray(tree.files[name])
                damage(raw, rng)
                Tree(tree.folders, tree.files | {name: bytes(raw)}).write(opener.path)
                store = opener.open()
                for block in blocks:
                    assert store.find(block.hash) in (block, None)
                    opener.read(block)
                assert all(opener.put(*blocks))
                store.record("ada", opener.spec.fingerprint, blocks[:3])
                opener.open()
                assert all(opener.read(block) for block in blocks)
                agent = opener.store.agents.get("ada")
                assert agent is not None and agent.heads[0].chain == tuple(blocks[:3])
                opener.close()
                shutil.rmtree(opener.path)
