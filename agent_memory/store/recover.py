"""What happens to a state directory before it is used: nothing found in it is taken on trust.

Knows the order of a start, docs/format.md tells it.  The thread that opens the store.
"""

import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass

import structlog

from agent_memory.block import HASH_BYTES, Block, BlockHash, Loss, root_of
from agent_memory.errors import StateDirError
from agent_memory.metrics import Metrics
from agent_memory.store import index as rows
from agent_memory.store.agents import Agents
from agent_memory.store.catalog import Catalog
from agent_memory.store.complaints import Complaints
from agent_memory.store.days import Day, Days
from agent_memory.store.files import move_into, read_file, sync_folder, write_new
from agent_memory.store.format import MAX_FILE_BYTES, BlockFile, Rejected, identify
from agent_memory.store.heads import Head, num_tokens
from agent_memory.store.index import HeadRow, Index, Statement
from agent_memory.store.state_dir import BLOCK_SUFFIX, StateDir, private_folder
from agent_memory.store.unfinished import take_over
from agent_memory.tenants import tenant_of

VERSION = b"3\n"

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """Every row of an index.  `blocks`: files, when they were last used and when read, in the order
    of reading.  `clock`: the last there was.  `facts`: of agents.  `written_for`: (block, agent),
    of turns that were cut short."""

    blocks: dict[BlockHash, tuple[BlockFile, int, int]]
    clock: int
    doomed: set[BlockHash]
    heads: list[HeadRow]
    facts: list[tuple[str, bool, int]]
    days: list[tuple[int, int, int]]
    written_for: list[tuple[BlockHash, str]]


def recover(state: StateDir, metrics: Metrics) -> tuple[Index, Catalog, Agents, Days]:
    """Bring directory and index into agreement.  Raises StateDirError."""
    try:
        _begin(state)
        _sweep(state, metrics)
        index, found = _open_index(state)
        try:
            scan = _Scan(state, metrics)
            scan.run(found)
            agents = load_agents(scan.catalog, found)
            useless = take_over(agents, scan.catalog, found.written_for)
            doomed = [statement for h in useless for statement in rows.doom_block(h)]
            index.commit(scan.changes + _all_agents(agents) + doomed)
            if useless:
                index.commit(scan.delete(useless))
            days = Days([Day(*row) for row in index.days()])
        except BaseException:
            index.close()
            raise
    except (OSError, sqlite3.Error) as error:
        raise StateDirError(
            f"{state.path} cannot be prepared: {error}. "
            "Free some space there or make it writable, or choose another state directory."
        ) from error
    return index, scan.catalog, agents, days


def _begin(state: StateDir) -> None:
    """A store of another version is set aside whole, never misread; then ours is made."""
    found = state.version.read_bytes() if state.version.exists() else None
    if found != VERSION:
        _set_aside(state, found)
        new = state.version.with_suffix(".new")
        new.unlink(missing_ok=True)
        write_new(new, [VERSION])
        new.rename(state.version)
    for folder in (state.blocks, state.tmp, state.quarantine, *state.block_folders()):
        private_folder(folder)
    sync_folder(state.blocks)
    sync_folder(state.path)


def _set_aside(state: StateDir, version: bytes | None) -> None:
    existing = [path for path in state.store_paths() if os.path.lexists(path)]
    if not existing:
        return
    target = state.next_set_aside()
    private_folder(target)
    for path in existing:
        path.rename(target / path.name)
    name = version.decode("ascii", "replace").strip() if version else "unknown"
    log.warning("store_set_aside", version=name, path=str(target))


def _sweep(state: StateDir, metrics: Metrics) -> None:
    for path in state.tmp.iterdir():
        path.unlink()
        metrics.orphans_swept.inc()


def _open_index(state: StateDir) -> tuple[Index, Found]:
    """The index and all its rows.  A damaged one is moved aside and begun anew, empty.  Raises
    StateDirError or sqlite3.Error when it cannot be known whether it is damaged."""
    try:
        return _read_index(state)
    except (sqlite3.DatabaseError, TypeError, ValueError) as error:  # what odd bytes lead to
        if rows.is_in_use(error):
            raise StateDirError(
                f"{state.index} is locked by another program. Close that program and start again."
            ) from error
        if rows.may_be_good(error):
            raise
        log.warning("index_rebuilt", reason=str(error))
    for path in state.store_paths():
        if path.name.startswith(state.index.name) and path.exists():
            move_into(state.quarantine, path)
    return _read_index(state)


def _read_index(state: StateDir) -> tuple[Index, Found]:
    index = Index.open(state.index)
    try:
        return index, read_rows(index)
    except BaseException:
        index.close()
        raise


def read_rows(index: Index) -> Found:
    """Raises sqlite3.Error, TypeError or ValueError when they are odd."""
    blocks = {row[0].block.hash: row for row in index.blocks()}
    heads, facts, days = list(index.heads()), list(index.agents()), list(index.days())
    rest = heads, facts, days, index.written_for()
    return Found(blocks, index.last_clock(), index.doomed(), *rest)


class _Scan:
    """Brings rows and files into agreement: one look at the names and sizes of all files; only
    those without a row are read."""

    def __init__(self, state: StateDir, metrics: Metrics) -> None:
        self.catalog = Catalog()
        self.changes: list[Statement] = []
        self._state = state
        self._rejected = Complaints("block_rejected", metrics.restore_rejected)

    def run(self, found: Found) -> None:
        on_disk = dict(block_files(self._state))
        self.changes += self.delete(found.doomed & on_disk.keys())
        self.catalog.advance(found.clock)
        for block_hash, (file, used, read) in found.blocks.items():
            size = on_disk.pop(block_hash, None)
            if size == file.file_bytes:
                self.catalog.load(file, used, read)
            else:
                self._refuse(block_hash, "missing" if size is None else "size")
                self.catalog.gone.note(file.block, Loss.MISSING if size is None else Loss.DAMAGED)
                self.changes.append(rows.drop_block(block_hash))
        for block_hash in on_disk.keys() - found.doomed:
            if on_disk[block_hash] > MAX_FILE_BYTES:  # it would be read into memory
                self._refuse(block_hash, "size")
            else:
                self._adopt(block_hash)

    def delete(self, doomed: set[BlockHash]) -> list[Statement]:
        """Files whose rows have gone.  -> that they have gone too"""
        paths = [self._state.block_path(block_hash) for block_hash in doomed]
        for path in paths:
            path.unlink()
        for folder in {path.parent for path in paths}:
            sync_folder(folder)
        return [rows.drop_all_doomed()]

    def _adopt(self, block_hash: BlockHash) -> None:
        """Take a file without a row if it proves to be what its name says."""
        try:
            file = identify(read_file(self._state.block_path(block_hash)))
            if file.block.hash != block_hash:
                raise Rejected("tokens")
        except Rejected as error:
            self._refuse(block_hash, error.reason)
        except OSError as error:
            self._refuse(block_hash, "io", error=str(error))
        else:
            used = self.catalog.clock
            self.catalog.load(file, used)
            self.changes.append(rows.put_block(file, used))

    def _refuse(self, block_hash: BlockHash, reason: str, **details: str) -> None:
        self._rejected.add(reason, block=block_hash.hex(), **details)
        if reason != "missing":
            move_into(self._state.quarantine, self._state.block_path(block_hash))


def block_files(state: StateDir) -> Iterator[tuple[BlockHash, int]]:
    """(hash, size) by the name of each file; names that are not ours are left alone."""
    for folder in state.block_folders():
        with os.scandir(folder) as entries:
            for entry in entries:
                block_hash = _hash_in(entry.name)
                if block_hash and entry.path == os.fspath(state.block_path(block_hash)):
                    yield block_hash, entry.stat(follow_symlinks=False).st_size


def _hash_in(name: str) -> BlockHash | None:
    try:
        block_hash = bytes.fromhex(name.removesuffix(BLOCK_SUFFIX))
    except ValueError:
        return None
    return BlockHash(block_hash) if len(block_hash) == HASH_BYTES else None


def load_agents(catalog: Catalog, found: Found) -> Agents:
    """Heads cut back to what is present, entered again in their order."""
    agents = Agents()
    for row in found.heads:
        if head := _present(catalog, row):
            agents.load(row.agent, head)
    for agent_id, pinned, bytes_written in found.facts:
        agents.load_facts(agent_id, pinned=pinned, bytes_written=bytes_written)
    return agents


def _present(catalog: Catalog, row: HeadRow) -> Head | None:
    chain: list[Block] = []
    parent = root_of(row.fingerprint, tenant_of(row.agent))
    for block_hash in row.chain:
        file = catalog.file(block_hash)
        if file is None or file.block.is_checkpoint or file.block.parent != parent:
            break
        if not all(block.full for block in chain[-1:]):
            break
        chain.append(file.block)
        parent = block_hash
    if not chain:
        return None
    head = Head(
        *(row.ordinal, min(row.first, row.ordinal), row.fingerprint, tuple(chain)),
        *(num_tokens(chain), row.turns, row.last_used),
    )
    files = filter(None, map(catalog.file, row.checkpoints))
    checkpoints = (file.block for file in files if file.block.is_checkpoint)
    return head.with_checkpoints(checkpoints).cut(min(row.num_tokens, head.num_tokens))


def _all_agents(agents: Agents) -> list[Statement]:
    each = (statement for agent in agents.all() for statement in rows.put_agent(agent))
    return [*rows.drop_all_agents(), *each]
