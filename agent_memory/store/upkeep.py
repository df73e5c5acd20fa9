"""What people do to a whole store while no server is at work: mend, collect, rebuild, wipe.

Knows which files are whose.  Needs the lock; each function leaves a directory that a start takes as
it is.  The thread of the command.
"""

import shutil
import sqlite3
import sys
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from agent_memory.block import BlockHash
from agent_memory.errors import NotFound, StateDirError
from agent_memory.metrics import Metrics
from agent_memory.store import index as rows
from agent_memory.store.block_store import BlockStore
from agent_memory.store.documents import RESPONSES, Documents, response_ids_of
from agent_memory.store.files import move_into, sync_folder
from agent_memory.store.format import BlockFile
from agent_memory.store.index import Index
from agent_memory.store.limits import Limits
from agent_memory.store.look import Amount, contents
from agent_memory.store.recover import read_rows, recover
from agent_memory.store.state_dir import StateDir
from agent_memory.tenants import is_name, outside, tenant_of

CLOSE_S = 60.0
NO_LIMITS = Limits(sys.maxsize, 0, None, None)
"""Who wipes one agent has not asked for others to be evicted."""


@dataclass(frozen=True, slots=True)
class Collected:
    blocks: Amount
    quarantine: Amount
    set_aside: Amount


def quarantine(state: StateDir, paths: Iterable[Path]) -> None:
    """Move bad files away and bring index and heads into agreement with what is left."""
    for path in paths:
        try:
            move_into(state.quarantine, path)
        except FileNotFoundError:
            continue
    settle(state)


def settle(state: StateDir) -> None:
    """As a start does."""
    index, *_ = recover(state, Metrics())
    index.close()


def collect(state: StateDir, *, dry_run: bool) -> Collected:
    """Delete what no agent has in mind, what was quarantined and what was set aside."""
    index, catalog, agents, _ = recover(state, Metrics())
    with closing(index):
        owned = {block_hash for agent in agents.all() for block_hash in agent.owned()}
        unowned = [file for file in catalog.files() if file.block.hash not in owned]
        folders = sorted(state.path.glob("set-aside-*"))
        collected = Collected(
            blocks=_amount(unowned),
            quarantine=contents(state.quarantine),
            set_aside=Amount(len(folders), sum(contents(path).nbytes for path in folders)),
        )
        if not dry_run:
            _delete_blocks(state, index, [file.block.hash for file in unowned])
            for path in (*state.quarantine.iterdir(), *folders):
                _delete(path)
            sync_folder(state.path)
    return collected


def rebuild(state: StateDir) -> Amount:
    """Make the index anew from the files, every one of them read and proven; whose they are is
    taken over from the old index as far as that can be read.  Raises StateDirError."""
    owners = _readable_owners(state)
    for path in state.index_paths():
        if path.exists():
            move_into(state.quarantine, path)
    if owners:
        with closing(Index.open(state.index)) as index:
            index.commit(owners)
    index, catalog, _, _ = recover(state, Metrics())
    index.close()
    return _amount(catalog.files())


def wipe(state: StateDir) -> Amount:
    """Delete everything that is remembered.  The lock and settings stay."""
    doomed = [*state.store_paths(), state.documents, *state.path.glob("set-aside-*")]
    amount = Amount()
    for path in doomed:
        found = contents(path) if path.is_dir() else Amount(0, _size(path))
        amount = Amount(amount.count + found.count, amount.nbytes + found.nbytes)
    for path in doomed:
        _delete(path)
    sync_folder(state.path)
    return amount


def wipe_agent(state: StateDir, agent_id: str) -> Amount:
    """Delete what is that agent's alone, and the responses it was given.

    Raises NotFound, and StateDirError if not all of it could be deleted.
    """
    sizes = _wipe_responses(state, agent_id)
    store = BlockStore.open(state, Metrics(), NO_LIMITS)
    try:
        before = store.disk_bytes
        removed = store.remove(agent_id)
        if not store.saved(CLOSE_S):
            raise StateDirError(
                f"Not all of '{agent_id}' could be deleted from {state.path}. Close what else has "
                "its index open, see the log for what cannot be written, and try again."
            )
        return Amount(len(removed) + len(sizes), before - store.disk_bytes + sum(sizes))
    except NotFound:
        if not sizes:
            raise
        return Amount(len(sizes), sum(sizes))
    finally:
        store.close(CLOSE_S)


def _wipe_responses(state: StateDir, agent_id: str) -> list[int]:
    """-> the size of each."""
    tenant = tenant_of(agent_id)
    if tenant is not None and not is_name(tenant):
        return []
    return Documents(state, RESPONSES, tenant).delete_all(response_ids_of(outside(agent_id)))


def _readable_owners(state: StateDir) -> list[rows.Statement]:
    """The old index's agents and heads as they are, none if it is damaged or not there."""
    if not state.index.exists():
        return []
    try:
        with closing(Index.read_only(state.index)) as index:
            read_rows(index)  # what this refuses would be refused again
            return list(index.copy_of_owners())
    except (sqlite3.Error, OSError, TypeError, ValueError) as error:
        if rows.may_be_good(error):
            raise StateDirError(
                f"{state.index} cannot be read now: {error}. Free some space there, close what "
                "else has it open, and try again. Only it says whose the files are; to do without, "
                "move it away."
            ) from error
        return []


def _delete_blocks(state: StateDir, index: Index, hashes: list[BlockHash]) -> None:
    index.commit(map(rows.drop_block, hashes))
    for block_hash in hashes:
        state.block_path(block_hash).unlink(missing_ok=True)


def _amount(files: Iterable[BlockFile]) -> Amount:
    sizes = [file.file_bytes for file in files]
    return Amount(len(sizes), sum(sizes))


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
