"""The one thread that changes the store: block files, their rows, the heads.

Knows the order in which things become durable, and that a failure is an answer, not an end.
Knows nothing of reading.  `submit` is for any thread, the rest is the writer's.

A batch is what waits in the queue when the thread comes to it, up to MAX_BATCH_BLOCKS blocks or to
a barrier.  It becomes durable in this order, so that a crash anywhere leaves only what a start can
put right:

    1  bad files to quarantine
    2  each block: tmp/random -> write -> fsync -> rename;  then one fsync per folder
    3  one SQLite transaction, in the order of the queue
    4  files of deleted blocks removed
    5  the catalog, then the callbacks, then the barriers
"""

import errno
import secrets
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread

from agent_memory.block import Block, BlockHash
from agent_memory.kv_spec import KVSpec
from agent_memory.metrics import Metrics
from agent_memory.store import index as rows
from agent_memory.store.agents import Recorded
from agent_memory.store.catalog import Catalog, Ticket
from agent_memory.store.complaints import Complaints, trace
from agent_memory.store.files import Bytes, flush_drive, move_into, sync_folder, write_new
from agent_memory.store.format import BlockFile, encode
from agent_memory.store.index import Index, Statement
from agent_memory.store.state_dir import StateDir

MAX_BATCH_BLOCKS = 32

OnWritten = Callable[[BlockHash, bool], None]


@dataclass(frozen=True, slots=True, eq=False)
class WriteBlock:
    """`on_written(hash, present)` is called once, on the writer thread, whatever happens."""

    block: Block
    payload: Bytes
    spec: KVSpec
    ticket: Ticket
    on_written: OnWritten


@dataclass(frozen=True, slots=True)
class RecordHead:
    agent_id: str
    recorded: Recorded


@dataclass(frozen=True, slots=True)
class DeleteBlock:
    """The catalog has forgotten it already."""

    block_hash: BlockHash


@dataclass(frozen=True, slots=True)
class Quarantine:
    file: BlockFile


@dataclass(frozen=True, slots=True)
class Barrier:
    """`reached` is set when everything submitted before is settled."""

    reached: Event
    last: bool = False


Job = WriteBlock | RecordHead | DeleteBlock | Quarantine | Barrier
_Written = dict[Ticket, BlockFile]


class Writer:
    def __init__(self, state: StateDir, index: Index, catalog: Catalog, metrics: Metrics) -> None:
        self._state = state
        self._index = index
        self._catalog = catalog
        self._metrics = metrics
        self._queue: SimpleQueue[Job] = SimpleQueue()
        self._lock = Lock()
        self._closing = False  # guarded by the lock, with the order of the queue
        self._failures = Complaints("persist_failed", metrics.persist_errors)
        self._callback_failures = Complaints("on_written_failed")
        self._thread = Thread(target=self._run, name="store-writer")
        self._thread.start()

    def submit(self, job: Job) -> bool:
        """False, and nothing done, once the writer is closing."""
        with self._lock:
            if not self._closing:
                self._closing = isinstance(job, Barrier) and job.last
                self._queue.put(job)
                return True
        return False

    def flush(self, timeout_s: float) -> bool:
        reached = Event()
        return self.submit(Barrier(reached)) and reached.wait(timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Everything submitted is settled first.  Says whether the thread has ended in time."""
        self.submit(Barrier(Event(), last=True))
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while self._perform(self._next_batch()):
            pass  # no local may keep a batch, and with it its payloads, while the queue is empty
        self._index.close()

    def _next_batch(self) -> list[Job]:
        batch, num_blocks = [self._queue.get()], 0
        while not isinstance(batch[-1], Barrier):
            num_blocks += isinstance(batch[-1], WriteBlock)
            if num_blocks == MAX_BATCH_BLOCKS:
                break
            try:
                batch.append(self._queue.get_nowait())
            except Empty:
                break
        return batch

    def _perform(self, batch: list[Job]) -> bool:
        """Settle every job of the batch.  Says whether there may be more to come."""
        written: _Written = {}
        try:
            written = self._persist(batch)
        except Exception as error:  # the thread must outlive any failure; it is counted and told
            self._complain(error)
        for job in batch:
            if isinstance(job, WriteBlock):
                self._settle(job, written.get(job.ticket))
        self._metrics.disk_bytes.set(self._catalog.disk_bytes)
        for job in batch:
            if isinstance(job, Barrier):
                job.reached.set()
        return not (isinstance(batch[-1], Barrier) and batch[-1].last)

    def _persist(self, batch: list[Job]) -> _Written:
        """What is on disk and committed.  Raises if nothing of the batch could be committed."""
        dropped = [
            rows.drop_block(job.file.block.hash)
            for job in batch
            if isinstance(job, Quarantine) and self._quarantine(job.file)
        ]
        written = self._write_files([job for job in batch if isinstance(job, WriteBlock)])
        touched = [rows.set_used(*use) for use in self._catalog.take_touched()]
        changes, doomed = _changes(batch, written)
        if statements := dropped + touched + changes:
            self._index.commit(statements)
        for block_hash in doomed:
            self._remove(self._state.block_path(block_hash))
        self._metrics.blocks_written.inc(len(written))
        self._metrics.bytes_written.inc(sum(file.file_bytes for file in written.values()))
        return written

    def _write_files(self, jobs: list[WriteBlock]) -> _Written:
        written: _Written = {}
        for job in jobs:
            if job.ticket not in written and self._catalog.wanted(job.ticket):
                try:
                    written[job.ticket] = self._write_file(job)
                except OSError as error:
                    self._complain(error)
        self._sync_folders(written)
        if written:
            # Any file there will do but the index: closing it would drop SQLite's locks.
            flush_drive(self._state.version)
        return written

    def _sync_folders(self, written: _Written) -> None:
        """The names are on disk, or the blocks of that folder are not written after all."""
        paths = {ticket: self._state.block_path(ticket.block_hash) for ticket in written}
        for folder in {path.parent for path in paths.values()}:
            try:
                sync_folder(folder)
            except OSError as error:
                self._complain(error)
                for ticket, path in paths.items():
                    if path.parent == folder:
                        del written[ticket]
                        self._remove(path)

    def _write_file(self, job: WriteBlock) -> BlockFile:
        file, pieces = encode(job.block, job.payload, job.spec)
        new = self._state.tmp / secrets.token_hex(8)
        try:
            write_new(new, pieces)
            new.rename(self._state.block_path(job.block.hash))
        except OSError:
            new.unlink(missing_ok=True)
            raise
        return file

    def _quarantine(self, file: BlockFile) -> bool:
        """Move a bad file away unless a good one has replaced it.  Says whether the row goes."""
        if not self._catalog.forget_file(file):
            return False
        try:
            move_into(self._state.quarantine, self._state.block_path(file.block.hash))
        except FileNotFoundError:
            pass  # it was found missing
        except OSError as error:
            self._complain(error)
        return True

    def _remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._complain(error)

    def _settle(self, job: WriteBlock, file: BlockFile | None) -> None:
        present = self._catalog.settle(job.ticket, file)
        try:
            job.on_written(job.block.hash, present)
        except Exception as error:  # theirs; the other callbacks of the batch are still owed
            self._callback_failures.add(type(error).__name__, trace=trace(error))

    def _complain(self, error: Exception) -> None:
        known = isinstance(error, OSError | sqlite3.Error)
        self._failures.add(_errno_name(error), error=str(error) if known else trace(error))


def _changes(batch: list[Job], written: _Written) -> tuple[list[Statement], set[BlockHash]]:
    """The rows to change, in the order of the queue, and the blocks whose files are to go."""
    statements: list[Statement] = []
    doomed: set[BlockHash] = set()
    for job in batch:
        match job:
            case WriteBlock() if file := written.get(job.ticket):
                statements.append(rows.put_block(file, job.ticket.clock))
                doomed.discard(job.block.hash)
            case RecordHead():
                statements += map(rows.drop_head, job.recorded.gone)
                statements.append(rows.put_head(job.agent_id, job.recorded.head))
            case DeleteBlock():
                statements.append(rows.drop_block(job.block_hash))
                doomed.add(job.block_hash)
            case _:
                pass
    return statements, doomed


def _errno_name(error: Exception) -> str:
    if isinstance(error, OSError):
        return errno.errorcode.get(error.errno or 0, "OSError")
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorname", "SQLITE_ERROR")
    return type(error).__name__
