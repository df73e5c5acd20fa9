"""F2: the power goes after any operation, on an ordered and on an unordered disk, and again while
the store is put right.

Each story is told once on a disk that writes everything down.  Then for every operation the folder
is made as the cut after it would have left it, and opened: what the program had promised by then is
there, nothing else is taken for a block, and a second start finds nothing more to do.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from agent_memory.block import Block
from tests.faults.stories import (
    EXTENTS,
    LONGER,
    SHORT,
    Before,
    Crashes,
    Extent,
    Story,
    told_and_cut,
)
from tests.store.conftest import Opener
from tests.suites import NewSuite


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


@pytest.mark.requirement("F-02")
@pytest.mark.parametrize("extent", EXTENTS)
@pytest.mark.parametrize(
    ("name", "before", "what"), STORIES, ids=[name.replace(" ", "-") for name, *_ in STORIES]
)
def test_the_power_goes(
    name: str,
    before: Before,
    what: Callable[[Story], None],
    extent: Extent,
    crashes: Crashes,
    suite: NewSuite,
) -> None:
    told_and_cut(crashes, name, before, what, extent, suite)
