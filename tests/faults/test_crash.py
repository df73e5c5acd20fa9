"""F2: the power goes after any operation, on an ordered and on an unordered disk, and again while
the store is put right.

Each story is told once on a disk that writes everything down.  Then for every operation the folder
is made as the cut after it would have left it, and opened: what the program had promised by then is
there, nothing else is taken for a block, and a second start finds nothing more to do.
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
class Has:
    """Said: these blocks are there."""

    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class LetsGo:
    """Said: from now on these may be gone."""

    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Head:
    """Said: the agent has this in mind."""

    chain: tuple[Block, ...]


@dataclass
class Promised:
    blocks: set[Block] = field(default_factory=set)
    head: tuple[Block, ...] = ()

    def hear(self, fact: object) -> None:
        match fact:
            case Has():
                self.blocks |= set(fact.blocks)
            case LetsGo():
                self.blocks -= set(fact.blocks)
                if set(self.head) & set(fact.blocks):
                    self.head = ()
            case Head():
                self.head = fact.chain


class Story:
    """What the program does on a disk that is watched, and what it says meanwhile."""

    def __init__(self, folder: Path, spec: KVSpec, payload_of: PayloadOf) -> None:
        self.opener = Opener(folder, spec, payload_of)
        self.disk = Disk(folder)
        self.spec = spec

    def blocks(self, *tokens: int) -> list[Block]:
        return chain(self.spec.fingerprint, tokens)

    def put(self, *blocks: Block) -> None:
        assert all(self.opener.put(*blocks))
        self.disk.tell(Has(blocks))

    def record(self, blocks: Sequence[Block], superseded: Sequence[Block] = ()) -> None:
        self.disk.tell(LetsGo(tuple(superseded)))
        dropped = self.opener.store.record(AGENT, self.spec.fingerprint, blocks)
        assert set(dropped) == set(superseded)
        assert self.opener.store.flush(10)
        self.disk.tell(Head(tuple(blocks)))


SHORT = tuple(range(600))
LONGER = tuple(range(700))


def save(story: Story) -> None:
    """Into a folder that is empty: the first start, a turn, another that goes on from it."""
    story.opener.open()
    first, second = story.blocks(*SHORT), story.blocks(*LONGER)
    story.put(*first)
    story.record(first)
    story.put(second[-1])
    story.record(second, superseded=first[-1:])
    story.put(*story.blocks(*SHORT[:300], 7, 7))
    story.opener.close()


def go_on(story: Story) -> None:
    """Where there was something: one block at a time, then a delete, then a clean end."""
    story.opener.open()
    for block in story.blocks(*range(1000, 1600)):
        story.put(block)
    first, second = story.blocks(*SHORT), story.blocks(*LONGER)
    story.put(second[-1])
    story.record(second, superseded=first[-1:])
    story.opener.close()


def quarantine(story: Story) -> None:
    """A bad file is found, moved away, and written anew."""
    store = story.opener.open()
    first = story.blocks(*SHORT)
    path = story.opener.file(first[1])
    assert not story.opener.read(first[1])
    assert store.find(first[1].hash) is None and not path.exists()
    story.put(first[1])
    story.opener.close()


def start(story: Story) -> None:
    """Only a start, and what it finds to be put right."""
    story.opener.open()
    story.opener.close()


def nothing(root: Path, first: list[Block], opener: Opener) -> list[Block]:
    shutil.rmtree(root)
    root.mkdir()
    return []


def untouched(root: Path, first: list[Block], opener: Opener) -> list[Block]:
    return first


def bad_file(root: Path, first: list[Block], opener: Opener) -> list[Block]:
    path = opener.file(first[1])
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    return [first[0], first[2]]


def disorder(root: Path, first: list[Block], opener: Opener) -> list[Block]:
    """Unfinished files, a file too long, one without a row, rows without files."""
    for n in range(3):
        (root / "tmp" / str(n)).write_bytes(bytes(n))
    with opener.file(first[1]).open("ab") as file:
        file.write(b"more")
    opener.file(first[2]).unlink()
    strange = root / "blocks" / "00" / f"{'00' * 32}.safetensors"
    strange.write_bytes(b"no block")
    return [first[0]]


def no_index(root: Path, first: list[Block], opener: Opener) -> list[Block]:
    (root / "index.db").unlink()
    return first


def bad_index(root: Path, first: list[Block], opener: Opener) -> list[Block]:
    path = root / "index.db"
    path.write_bytes(path.read_bytes()[:100] + bytes(path.stat().st_size - 100))
    return first


def other_version(root: Path, first: list[Block], opener: Opener) -> list[Block]:
    (root / "VERSION").write_bytes(b"0\n")
    return []


Before = Callable[[Path, list[Block], Opener], list[Block]]
STORIES: list[tuple[str, Before, Callable[[Story], None]]] = [
    ("save", nothing, save),
    ("go on", untouched, go_on),
    ("quarantine", bad_file, quarantine),
    ("start", untouched, start),
    ("start in disorder", disorder, start),
    ("start without index", no_index, start),
    ("start with a bad index", bad_index, start),
    ("start with another version", other_version, start),
]


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
            found = {path.stem for path in (root / "blocks").rglob("*.safetensors")}
            blocks = [store.find(BlockHash(bytes.fromhex(name))) for name in found]
            good = {block.hash for block in blocks if block and opener.read(block)}
            assert not again or (len(good) == len(found) and len(opener.quarantined()) == before)
            return good
        finally:
            opener.close()


@pytest.fixture
def crashes(fast_folder: Path, spec: KVSpec, payload_of: PayloadOf) -> Crashes:
    return Crashes(fast_folder, spec, payload_of)


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


@pytest.mark.parametrize(
    ("num_unordered", "most", "most_again"),
    [
        pytest.param(2, 6, 1, id="short"),
        pytest.param(
            3, 100_000, 40, id="full", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]
        ),
    ],
)
@pytest.mark.parametrize(
    ("name", "before", "what"), STORIES, ids=[name.replace(" ", "-") for name, *_ in STORIES]
)
def test_the_power_goes(
    name: str,
    before: Before,
    what: Callable[[Story], None],
    num_unordered: int,
    most: int,
    most_again: int,
    crashes: Crashes,
    suite: NewSuite,
) -> None:
    rng = Random(SEED)
    told = crashes.tell(before, what)
    if len(told.log) > MANY_OPS:  # most of them make one folder after another
        num_unordered, most_again = 1, 1
    first = sample(cuts(told, num_unordered, rng), most, rng)
    with (
        suite(f"F2 crash: {name}", len(first), SEED) as cases,
        suite(f"F2 crash again at the start: {name}", 0, SEED) as cases_again,
    ):
        for tree, num_ops in first:
            promised = told.promised(num_ops)
            with cases.case(num_ops):
                started = crashes.start(tree, promised)
                again = sample(cuts(started, num_unordered, rng), most_again, rng)
                cases_again.planned += len(again)
                for tree_again, num_more in again:
                    with cases_again.case((num_ops, num_more)):
                        crashes.start(tree_again, promised)
