"""Stories of a store, told on a disk that writes everything down, and what a start makes of the
folder that a power cut would have left at any place of them.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from agent_memory.block import Block, BlockHash, chain
from agent_memory.kv_spec import KVSpec
from tests.faults.chains import remembers
from tests.faults.crash import Tree, cut
from tests.faults.disk import Disk, Op
from tests.store.conftest import Opener, PayloadOf
from tests.suites import NewSuite

SEED = 20
MANY_OPS = 100
AGENT = "ada"


@dataclass(frozen=True)
class MayCome:
    """Said: from now on these may be there."""

    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Has:
    """Said: these blocks are there."""

    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class LetsGo:
    """Said: from now on these may be gone."""

    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Wiped:
    """Said: nothing of these is there any more."""

    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Head:
    """Said: the agent has this in mind."""

    chain: tuple[Block, ...]


@dataclass(frozen=True)
class Alone:
    """Said: these are that agent's alone from now on, and go with it."""

    agent: str
    blocks: tuple[Block, ...]


@dataclass
class Promised:
    blocks: set[Block] = field(default_factory=set)
    head: tuple[Block, ...] = ()
    wiped: set[Block] = field(default_factory=set)
    alone: dict[str, tuple[Block, ...]] = field(default_factory=dict)

    def hear(self, fact: object) -> None:
        match fact:
            case Has():
                self.blocks |= set(fact.blocks)
            case MayCome():
                self.wiped -= set(fact.blocks)
            case Wiped():
                self.wiped |= set(fact.blocks)
            case LetsGo():
                self.blocks -= set(fact.blocks)
                if set(self.head) & set(fact.blocks):
                    self.head = ()
            case Head():
                self.head = fact.chain
            case Alone():
                self.alone[fact.agent] = fact.blocks


class Story:
    """What the program does on a disk that is watched, and what it says meanwhile."""

    def __init__(self, folder: Path, spec: KVSpec, payload_of: PayloadOf) -> None:
        self.opener = Opener(folder, spec, payload_of)
        self.disk = Disk(folder)
        self.spec = spec

    def blocks(self, *tokens: int) -> list[Block]:
        return chain(self.spec.fingerprint, tokens)

    def put(self, *blocks: Block, agent_id: str | None = None) -> None:
        self.disk.tell(MayCome(blocks))
        assert all(self.opener.put(*blocks, agent_id=agent_id))
        self.disk.tell(Has(blocks))

    def record(self, blocks: Sequence[Block], superseded: Sequence[Block] = ()) -> None:
        self.disk.tell(LetsGo(tuple(superseded)))
        dropped = self.opener.store.record(AGENT, self.spec.fingerprint, blocks)
        assert set(dropped) == set(superseded)
        assert self.opener.store.flush(10)
        self.disk.tell(Head(tuple(blocks)))


SHORT = tuple(range(600))
LONGER = tuple(range(700))
Before = Callable[[Path, list[Block], Opener], list[Block]]
"""Makes the folder what it is before the story, from one with the chain SHORT; -> what is left."""


@dataclass
class Told:
    """A story that was told: the folder before it, what was done, what had been promised before."""

    base: Tree
    log: list[Op]
    before: list[Block]

    def promised(self, num_ops: int) -> Promised:
        promised = Promised(set(self.before))
        for op in self.log[:num_ops]:
            promised.hear(op.told)
        return promised


class Crashes:
    """Makes folders after a cut and looks at what a start makes of them."""

    def __init__(self, folder: Path, spec: KVSpec, payload_of: PayloadOf) -> None:
        self.folder = folder
        self.spec = spec
        self.payload_of = payload_of

    def tell(self, before: Before, what: Callable[[Story], None]) -> Told:
        root = self.folder / "told"
        opener = Opener(root, self.spec, self.payload_of)
        store, first = opener.open(), chain(self.spec.fingerprint, SHORT)
        opener.put(*first)
        store.record(AGENT, self.spec.fingerprint, first)
        opener.close()
        there = before(root, first, opener)
        base = Tree.of(root)
        with Disk(root).watched() as disk:
            story = Story(root, self.spec, self.payload_of)
            story.disk = disk
            what(story)
        return Told(base, disk.log, there)

    def start(self, tree: Tree, promised: Promised) -> Told:
        """What a start does with it, twice.  Raises if anything promised is gone."""
        for name in ("index.db", "index.db-wal"):
            raw = tree.files.get(name, b"")
            for block in promised.wiped:
                assert raw.find(block.hash) == raw.find(block.tokens[-64:]) == -1
        root = self.folder / "cut"
        tree.write(root)
        try:
            with Disk(root).watched() as disk:
                found = self._start(root, promised)
            assert self._start(root, promised, again=True) == found
        finally:
            shutil.rmtree(root)
        return Told(tree, disk.log, list(promised.blocks))

    def _start(self, root: Path, promised: Promised, again: bool = False) -> set[BlockHash]:
        opener = Opener(root, self.spec, self.payload_of)
        store = opener.open()
        try:
            assert not list((root / "tmp").iterdir())
            assert not again or opener.metric("orphans_swept_total") == 0
            before = len(opener.quarantined())
            missing = [block for block in promised.blocks if not opener.read(block)]
            assert not missing, f"{len(missing)} promised blocks are gone"
            agent = store.agents.get(AGENT)
            heads = agent.heads if agent else ()
            assert not promised.head or any(remembers(head, promised.head) for head in heads)
            names = {path.name[:64] for path in root.rglob("*.safetensors*")}
            assert not {block.hash.hex() for block in promised.wiped} & names
            found = {path.stem for path in (root / "blocks").rglob("*.safetensors")}
            blocks = [store.find(BlockHash(bytes.fromhex(name))) for name in found]
            good = {block.hash for block in blocks if block and opener.read(block)}
            assert not again or (len(good) == len(found) and len(opener.quarantined()) == before)
            if again:
                _remove(opener, promised.alone)
            return good
        finally:
            opener.close()


def _remove(opener: Opener, alone: dict[str, tuple[Block, ...]]) -> None:
    for agent_id, blocks in alone.items():
        if opener.store.agents.get(agent_id):
            opener.store.remove(agent_id)
        assert opener.store.saved(10)
        assert not [block for block in blocks if opener.file(block).exists()]


def cuts(told: Told, num_unordered: int, rng: Random) -> list[tuple[Tree, int]]:
    """(folder, number of operations before the cut), the same folder only once in a place."""
    found: list[tuple[Tree, int]] = []
    for num_ops in range(len(told.log) + 1):
        log = told.log[:num_ops]
        if log and log[-1].kind in ("told", "fsync", "sync_folder"):
            continue  # on either disk there is nothing new
        trees = [cut(told.base, log, None)]
        trees += [cut(told.base, log, rng) for _ in range(num_unordered)]
        found += [(tree, num_ops) for n, tree in enumerate(trees) if tree not in trees[:n]]
    return found


def sample(found: list[tuple[Tree, int]], most: int, rng: Random) -> list[tuple[Tree, int]]:
    return found if len(found) <= most else [found[-1], *rng.sample(found[:-1], most - 1)]


@dataclass(frozen=True)
class Extent:
    """How many cuts are tried: of each place on an unordered disk, of a story, of a start."""

    num_unordered: int
    most: int
    most_again: int


def told_and_cut(
    crashes: Crashes,
    name: str,
    before: Before,
    what: Callable[[Story], None],
    extent: Extent,
    suite: NewSuite,
) -> None:
    rng = Random(SEED)
    told = crashes.tell(before, what)
    if len(told.log) > MANY_OPS:  # most of them make one folder after another
        extent = Extent(1, extent.most, 1)
    first = sample(cuts(told, extent.num_unordered, rng), extent.most, rng)
    with (
        suite(f"F2 crash: {name}", len(first), SEED) as cases,
        suite(f"F2 crash again: {name}", 0, SEED) as cases_again,
    ):
        for tree, num_ops in first:
            promised = told.promised(num_ops)
            with cases.case(num_ops):
                started = crashes.start(tree, promised)
                again = sample(cuts(started, extent.num_unordered, rng), extent.most_again, rng)
                cases_again.planned += len(again)
                for tree_again, num_more in again:
                    with cases_again.case((num_ops, num_more)):
                        crashes.start(tree_again, promised)


EXTENTS = [
    pytest.param(Extent(2, 6, 1), id="short"),
    pytest.param(
        Extent(3, 100_000, 40), id="full", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]
    ),
]
