"""A removal is done when nothing is left; what is in the way is waited for, and tried again."""

import errno
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from agent_memory.block import Block
from agent_memory.errors import StateDirError
from agent_memory.store import upkeep, writer
from agent_memory.store.state_dir import StateDir
from tests.store.conftest import Opener, names
from tests.store.test_ownership import no_trace, remember


@pytest.mark.requirement("S-24")
@pytest.mark.parametrize("is_wiped", [False, True], ids=["removed", "wiped"])
def test_indexes_in_quarantine_go_with_an_agent(
    monkeypatch: pytest.MonkeyPatch, opener: Opener, blocks: list[Block], is_wiped: bool
) -> None:
    """They tell its name and what it said.  If one cannot go now, the removal is not done."""
    monkeypatch.setattr(writer, "IDLE_S", 0.05)
    opener.open()
    remember(opener, "Agnes", blocks)
    opener.close()
    upkeep.rebuild(StateDir.unlocked(opener.path))
    [kept] = opener.path.glob("quarantine/index.db.*")
    assert b"Agnes" in kept.read_bytes()
    if is_wiped:
        upkeep.wipe_agent(StateDir.unlocked(opener.path), "Agnes")
    else:
        store, unlink = opener.open(), Path.unlink
        with monkeypatch.context() as patch:

            def refused(path: Path, missing_ok: bool = False) -> None:
                if path == kept:
                    raise PermissionError(errno.EPERM, "no")
                unlink(path, missing_ok)

            patch.setattr(Path, "unlink", refused)
            store.remove("Agnes")
            assert not store.saved(0.3)
        assert store.saved(5)
    assert not list(opener.path.glob("quarantine/*"))
    assert no_trace(opener, [b"Agnes", blocks[2].hash, blocks[2].tokens[:200]])


def test_a_wipe_says_when_it_could_not_be_done(
    monkeypatch: pytest.MonkeyPatch, opener: Opener, blocks: list[Block]
) -> None:
    monkeypatch.setattr(upkeep, "CLOSE_S", 1.0)
    opener.open()
    remember(opener, "Agnes", blocks)
    opener.close()
    state = StateDir.unlocked(opener.path)
    with closing(sqlite3.connect(state.index)) as db:
        db.execute("BEGIN")
        db.execute("SELECT * FROM blocks").fetchone()
        with pytest.raises(StateDirError, match="Not all of 'Agnes'"):
            upkeep.wipe_agent(state, "Agnes")
        db.rollback()
    opener.open()
    assert no_trace(opener, [b"Agnes", blocks[0].hash])


@pytest.mark.requirement("S-24")
def test_a_file_that_cannot_be_deleted_now_is_deleted_later(
    monkeypatch: pytest.MonkeyPatch, opener: Opener, blocks: list[Block]
) -> None:
    """Until then the removal is not done.  A block that is written anew meanwhile stays."""
    monkeypatch.setattr(writer, "IDLE_S", 0.05)
    store, unlink = opener.open(), Path.unlink
    remember(opener, "Agnes", blocks)
    stuck = {opener.file(block) for block in blocks[:2]}

    def refused(path: Path, missing_ok: bool = False) -> None:
        if path in stuck:
            raise PermissionError(errno.EPERM, "no")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refused)
    store.remove("Agnes")
    assert not store.saved(0.3)
    assert opener.files() == names(*blocks[:2])
    assert opener.put(blocks[0]) == [True]
    assert not store.saved(0.3)
    stuck.clear()
    assert store.saved(5)
    assert opener.files() == names(blocks[0])
    assert no_trace(opener, [b"Agnes", blocks[1].hash])
    opener.open()
    assert opener.read(blocks[0])
