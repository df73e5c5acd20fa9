"""F3: any operation of the store fails, once or from then on.

The request goes on: every question is answered, no call raises, a block that could not be written
is said not to be there, and one said to be there is.  When the disk works again, so does the store.
"""

import errno
import os
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import Random

import pytest
from structlog.testing import capture_logs

from agent_memory.block import Block, chain
from agent_memory.errors import StateDirError
from agent_memory.kv_spec import KVSpec
from tests.faults.crash import Tree
from tests.faults.disk import Disk, Fault
from tests.store.conftest import Opener, PayloadOf
from tests.suites import NewSuite

SEED = 30
AGENT = "ada"
ERRORS = [
    errno.ENOSPC,
    errno.EIO,
    errno.EROFS,
    errno.EACCES,
    errno.EMFILE,
    errno.EDQUOT,
]
SYNCS = ("fsync", "sync_folder")


@dataclass
class Failing:
    """Refuses the operation of that number, or from it on.  `kinds`: only these count."""

    number: int
    error: int
    for_ever: bool
    kinds: tuple[str, ...] = ()
    count: int = 0

    def __call__(self, kind: str, path: str) -> None:
        if self.kinds and kind not in self.kinds:
            return
        self.count += 1
        if self.count == self.number or (self.for_ever and self.count > self.number):
            if kind in ("index", "connect"):
                raise sqlite3.OperationalError(f"injected: {os.strerror(self.error)}")
            raise OSError(self.error, os.strerror(self.error), path)


class Stage:
    """A store with one chain and its owner, made anew for every case."""

    def __init__(self, folder: Path, spec: KVSpec, payload_of: PayloadOf) -> None:
        self.spec, self.root = spec, folder / "state"
        self.opener = Opener(self.root, spec, payload_of)
        self.first = chain(spec.fingerprint, range(600))
        self.longer = chain(spec.fingerprint, range(900))
        self.other = chain(spec.fingerprint, range(5000, 5300))
        store = self.opener.open()
        self.opener.put(*self.first)
        store.record(AGENT, spec.fingerprint, self.first)
        self.opener.close()
        self._tree = Tree.of(self.root)

    def reset(self) -> None:
        shutil.rmtree(self.root)
        self._tree.write(self.root)

    @property
    def all(self) -> list[Block]:
        return [*self.longer, *self.other]

    def turn(self) -> set[Block]:
        """A turn after another, whatever the disk does; -> the blocks said to be there."""
        opener, store = self.opener, self.opener.store
        new = [*self.longer[2:], *self.other]
        present = {block for block, ok in zip(new, opener.put(*new), strict=True) if ok}
        store.record(AGENT, self.spec.fingerprint, self.longer)
        opener.read(self.first[0])
        present.update(block for block in self.first[:2] if store.find(block.hash))
        assert store.flush(10)
        for block in present:
            assert store.find(block.hash) == block
        opener.read(self.other[0])
        store.check()
        return {block for block in present if store.find(block.hash)}

    def works_again(self) -> None:
        """Now, and after a start."""
        opener = self.opener
        assert all(opener.put(*self.all))
        opener.store.record(AGENT, self.spec.fingerprint, self.longer)
        for _ in range(2):
            assert all(opener.read(block) for block in self.all)
            opener.store.check()
            opener.open()
        agent = opener.store.agents.get(AGENT)
        assert agent is not None and agent.heads[0].chain == tuple(self.longer)
        assert not list((self.root / "tmp").iterdir())
        opener.close()

    def has(self, blocks: set[Block]) -> None:
        """After a start."""
        self.opener.open()
        missing = [block for block in blocks if not self.opener.read(block)]
        assert not missing, f"{len(missing)} blocks were said to be there"


@pytest.fixture
def stage(fast_folder: Path, spec: KVSpec, payload_of: PayloadOf) -> Iterator[Stage]:
    stage = Stage(fast_folder, spec, payload_of)
    yield stage
    stage.opener.close()


def working(kind: str, path: str) -> None:
    pass


def running(stage: Stage, disk: Disk, fault: Fault) -> None:
    """It fails during a turn, and then works again."""
    stage.opener.open()
    disk.fault = fault
    present = stage.turn()
    disk.fault = working
    assert all(stage.opener.read(block) for block in present)
    stage.works_again()


def closing(stage: Stage, disk: Disk, fault: Fault) -> None:
    """It fails during a turn and until the end."""
    stage.opener.open()
    disk.fault = fault
    present = stage.turn()
    stage.opener.close()
    disk.fault = working
    stage.has(present)
    stage.works_again()


def starting(stage: Stage, disk: Disk, fault: Fault) -> None:
    """It fails while a store is opened, which it then says, or it opens."""
    (stage.root / "tmp" / "unfinished").write_bytes(b"half a block")
    disk.fault = fault
    with suppress(StateDirError):
        stage.opener.open()
    disk.fault = working
    stage.has(set(stage.first))
    stage.works_again()


Part = Callable[[Stage, Disk, Fault], None]


def tried(stage: Stage, part: Part, fault: Failing, most_written: int | None = None) -> None:
    """One case: a new folder, the part with the fault, and a calm log."""
    stage.reset()
    with Disk(stage.root).watched() as disk, capture_logs() as logs:
        disk.most_written = most_written
        part(stage, disk, fault)
    told = Counter((log["event"], log.get("kind")) for log in logs)
    assert max(told.values(), default=0) <= 2, told  # once for each store that was open


def count(stage: Stage, part: Part, kinds: tuple[str, ...] = ()) -> int:
    never = Failing(0, 0, False, kinds)
    tried(stage, part, never)
    return never.count


def all_faults(stage: Stage, part: Part) -> Iterator[Failing]:
    """Every error at every operation, once and for ever; then syncs alone."""
    for number, error, for_ever in product(range(1, count(stage, part) + 1), ERRORS, (False, True)):
        yield Failing(number, error, for_ever)
    for number, for_ever in product(range(1, count(stage, part, SYNCS) + 1), (False, True)):
        yield Failing(number, errno.EIO, for_ever, SYNCS)


def one_error_each(stage: Stage, part: Part) -> Iterator[Failing]:
    """The errors take turns: a start has many operations, and most of the rest is tried above."""
    numbers = range(1, count(stage, part) + 1)
    for number, for_ever in product(numbers, (False, True)):
        yield Failing(number, ERRORS[number % len(ERRORS)], for_ever)


@pytest.mark.requirement("F-03")
@pytest.mark.parametrize(
    "most",
    [
        pytest.param(12, id="short"),
        pytest.param(100_000, id="full", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
@pytest.mark.parametrize(
    ("part", "faults"),
    [(running, all_faults), (closing, one_error_each), (starting, one_error_each)],
    ids=["running", "closing", "starting"],
)
def test_an_operation_fails(
    part: Part,
    faults: Callable[[Stage, Part], Iterator[Failing]],
    most: int,
    stage: Stage,
    suite: NewSuite,
) -> None:
    planned = list(faults(stage, part))
    if len(planned) > most:
        planned = Random(SEED).sample(planned, most)
    with suite(f"F3 operation fails: {part.__name__}", len(planned), SEED) as cases:
        for fault in planned:
            with cases.case(fault):
                tried(stage, part, fault)


@pytest.mark.requirement("F-03")
@pytest.mark.parametrize("most_written", [1, 1000, 4096])
def test_short_writes_are_gone_on_with(most_written: int, stage: Stage, suite: NewSuite) -> None:
    never = Failing(0, 0, False)
    tried(stage, running, never, most_written)
    assert stage.opener.metric("persist_errors_total", errno="EIO") == 0
