"""The one thread that changes the store: block files, their rows, the agents.

Knows the order in which things become durable, and that a failure is an answer, not an end.
Knows nothing of reading.  `submit` is for any thread, the rest is the writer's.

A batch is what waits in the queue when the thread comes to it, up to MAX_BATCH_BLOCKS blocks or to
a barrier.  It becomes durable in this order, so that a crash anywhere leaves only what a start can
put right:

    1  bad files to quarantine
    2  each block: tmp/random -> write -> fsync -> rename;  then one fsync per folder
    3  one SQLite transaction, in the order of the queue; what is to be deleted is listed in it
    4  the files of deleted blocks removed, and with the next transaction the list of them
    5  the catalog, then the callbacks, then the barriers

If the transaction fails, blocks count as not written; agents and deletions are tried again with the
next batch.
"""

import errno
import secrets
import sqlite3
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread

from agent_memory.block import BlockHash
from agent_memory.metrics import Metrics
from agent_memory.store import index as rows
from agent_memory.store.agents import Agents
from agent_memory.store.catalog import Catalog
from agent_memory.store.complaints import Complaints, trace
from agent_memory.store.files import flush_drive, move_into, sync_folder, write_new
from agent_memory.store.format import BlockFile, encode
from agent_memory.store.index import Index, Statement
from agent_memory.store.jobs import (
    Barrier,
    Job,
    Quarantine,
    RemoveAgent,
    SaveAgent,
    WriteBlock,
    Written,
    changes,
    still_owed,
)
from agent_memory.store.state_dir import StateDir

MAX_BATCH_BLOCKS = 32


class Writer:
    def __init__(
        self, state: StateDir, index: Index, catalog: Catalog, agents: Agents, metrics: Metrics
    ) -> None:
        self._state = state
        self._index = index
        self._catalog = catalog
        self._agents = agents
        self._metrics = metrics
        self._owed: list[Job] = []
        self._to_wipe = False  # an agent was removed, and its traces are not gone yet
        self._removed: list[BlockHash] = []  # files that have gone and are still listed to go
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
        written: Written = {}
        jobs = self._owed + batch
        try:
            written = self._persist(jobs)
            self._owed = []
        except Exception as error:  # the thread must outlive any failure; it is counted and told
            self._owed = still_owed(jobs)
            self._complain(error)
        for job in batch:
            if isinstance(job, WriteBlock):
                self._settle(job, written.get(job.ticket))
        self._metrics.disk_bytes.set(self._catalog.disk_bytes)
        for job in batch:
            if isinstance(job, Barrier):
                job.reached.set()
        return not (isinstance(batch[-1], Barrier) and batch[-1].last)

    def _persist(self, batch: list[Job]) -> Written:
        """What is on disk and committed.  Raises if nothing of the batch could be committed."""
        dropped = [
            rows.drop_block(job.file.block.hash)
            for job in batch
            if isinstance(job, Quarantine) and self._quarantine(job.file)
        ]
        written = self._write_files([job for job in batch if isinstance(job, WriteBlock)])
        touched = [rows.set_used(*use) for use in self._catalog.take_touched()]
        changed, doomed = changes(batch, written)
        done = [rows.drop_doomed(block_hash) for block_hash in self._removed]
        if statements := dropped + done + touched + changed + self._credit(batch, written):
            self._index.commit(statements)
        self._removed = [h for h in doomed if self._remove(self._state.block_path(h))]
        self._to_wipe |= any(isinstance(job, RemoveAgent) for job in batch)
        if self._to_wipe:
            self._to_wipe = not self._wipe()
        self._metrics.blocks_written.inc(len(written))
        self._metrics.bytes_written.inc(sum(file.file_bytes for file in written.values()))
        return written

    def _credit(self, batch: list[Job], written: Written) -> list[Statement]:
        """Who had how much written, as it is now."""
        left, changed = dict(written), dict[str, None]()
        for job in batch:
            if isinstance(job, SaveAgent):
                changed[job.agent.id] = None
            elif isinstance(job, WriteBlock) and job.agent_id is not None:
                if file := left.pop(job.ticket, None):
                    self._agents.credit(job.agent_id, file.file_bytes)
                    changed[job.agent_id] = None
        known = (self._agents.get(agent_id) for agent_id in changed)
        return [rows.set_written(agent) for agent in known if agent]

    def _wipe(self) -> bool:
        """What was removed is nowhere: no name comes back after a crash, no row is in the log."""
        try:
            for folder in {self._state.block_path(h).parent for h in self._removed}:
                sync_folder(folder)
            self._index.commit([rows.drop_doomed(h) for h in self._removed])
            self._removed = []
            return self._index.wipe_log()
        except (OSError, sqlite3.Error) as error:
            self._complain(error)
            return False

    def _write_files(self, jobs: list[WriteBlock]) -> Written:
        written: Written = {}
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

    def _sync_folders(self, written: Written) -> None:
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

    def _remove(self, path: Path) -> bool:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._complain(error)
            return False
        return True

    def _settle(self, job: WriteBlock, file: BlockFile | None) -> None:
        present = self._catalog.settle(job.ticket, file)
        try:
            job.on_written(job.block.hash, present)
        except Exception as error:  # theirs; the other callbacks of the batch are still owed
            self._callback_failures.add(type(error).__name__, trace=trace(error))

    def _complain(self, error: Exception) -> None:
        known = isinstance(error, OSError | sqlite3.Error)
        self._failures.add(_errno_name(error), error=str(error) if known else trace(error))


def _errno_name(error: Exception) -> str:
    if isinstance(error, OSError):
        return errno.errorcode.get(error.errno or 0, "OSError")
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorname", "SQLITE_ERROR")
    return type(error).__name__
