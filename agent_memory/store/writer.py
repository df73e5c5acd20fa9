"""The one thread that changes the store: block files, their rows, the agents.

Knows the order in which things become durable, and that a failure is an answer, not an end.
Knows nothing of reading.  `submit` is for any thread, the rest is the writer's.

A batch is what waits in the queue when the thread comes to it, up to MAX_BATCH_BLOCKS blocks or to
a barrier.  It becomes durable in this order, so that a crash anywhere leaves only what a start can
put right:

    1  bad files to quarantine; if there is no room, others deleted as in 3 and 4;  whose the
       blocks are that come now
    2  each block: tmp/random -> write -> fsync -> rename;  then one fsync per folder
    3  one SQLite transaction, in the order of the queue; what is to be deleted is listed in it
    4  the files of deleted blocks removed, and with the next transaction the list of them
    5  the catalog, then the callbacks, then the barriers

If the transaction fails, blocks count as not written; agents and deletions are tried again with the
next batch, or after IDLE_S.  So are files that cannot be removed.
"""

import sqlite3
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread

from agent_memory.block import BlockHash
from agent_memory.metrics import Metrics
from agent_memory.store import index as rows
from agent_memory.store.agents import Agents
from agent_memory.store.block_files import BlockFiles
from agent_memory.store.catalog import Catalog
from agent_memory.store.complaints import Complaints, trace
from agent_memory.store.eviction import Eviction
from agent_memory.store.format import BlockFile, size_of_file
from agent_memory.store.index import Index, Statement
from agent_memory.store.jobs import (
    Barrier,
    DeleteBlocks,
    Job,
    Quarantine,
    RemoveAgent,
    SaveAgent,
    WriteBlock,
    Written,
    changes,
    names,
    still_owed,
)
from agent_memory.store.limits import Budget

MAX_BATCH_BLOCKS = 32
IDLE_S, REST_S = 1.0, 600.0
"""Between two files read while idle, and until it is asked again whether there is one."""
SCRUB_DAYS = 7
"""Each file is read about once in so many days on which the server runs."""


class Writer:
    """`on_cut` is told, on the writer thread, which agents' heads eviction has made shorter."""

    def __init__(
        self,
        files: BlockFiles,
        index: Index,
        catalog: Catalog,
        agents: Agents,
        budget: Budget,
        metrics: Metrics,
        on_cut: Callable[[set[str]], None],
    ) -> None:
        self._files = files
        self._index = index
        self._catalog = catalog
        self._agents = agents
        self._budget = budget
        self._metrics = metrics
        self._on_cut = on_cut
        self._eviction = Eviction(catalog, agents)
        self._tended = False
        self._owed: list[Job] = []
        self._to_wipe = False  # an agent was removed, and its traces are not gone yet
        self._to_purge: set[BlockHash] = set()  # of these, in quarantine
        self._removed: list[BlockHash] = []  # files that have gone and are still listed to go
        self._stuck: set[BlockHash] = set()  # files that should have gone with this batch
        self._queue: SimpleQueue[Job] = SimpleQueue()
        self._lock = Lock()
        self._wait_s = IDLE_S
        self._closing = False  # guarded by the lock, with the order of the queue
        self._callback_failures = Complaints("on_written_failed")
        self._thread = Thread(target=self._run, name="store-writer")

    def start(self, on_idle: Callable[[int], bool]) -> None:
        """`on_idle(clock)` is called on the writer thread while there is nothing to do: files last
        read then or before may be read again.  It says whether there is more to come soon."""
        self._idle = on_idle
        self._thread.start()

    def submit(self, job: Job) -> bool:
        """False, and nothing done, once the writer is closing."""
        with self._lock:
            if not self._closing:
                self._closing = isinstance(job, Barrier) and job.last
                self._queue.put(job)
                return True
        return False

    @property
    def owes(self) -> bool:
        """Whether what could not be done waits to be done again.  Ask after a flush."""
        return bool(self._owed) or self._to_wipe

    def flush(self, timeout_s: float) -> bool:
        reached = Event()
        return self.submit(Barrier(reached)) and reached.wait(timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Everything submitted is settled first.  Says whether the thread has ended in time."""
        self.submit(Barrier(Event(), last=True))
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        self._perform([])  # the limits may have become narrower
        while self._perform(self._next_batch()):
            pass  # no local may keep a batch, and with it its payloads, while the queue is empty
        self._index.close()

    def _next_batch(self) -> list[Job]:
        try:
            wait_s = IDLE_S if self.owes else self._wait_s
            batch, num_blocks = [self._queue.get(timeout=wait_s)], 0
        except Empty:
            more = self._idle(self._budget.days.before(SCRUB_DAYS))
            self._wait_s = IDLE_S if more else REST_S
            return []
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
            self._files.complain(error)
        if stuck := self._stuck - {ticket.block_hash for ticket in written}:
            self._owed.append(DeleteBlocks(tuple(stuck)))
        self._stuck = set()
        for job in batch:
            if isinstance(job, WriteBlock):
                self._settle(job, written.get(job.ticket))
        self._metrics.disk_bytes.set(self._catalog.disk_bytes)
        for job in batch:
            if isinstance(job, Barrier):
                job.reached.set()
        last = batch[-1] if batch else None
        return not (isinstance(last, Barrier) and last.last)

    def _persist(self, jobs: list[Job]) -> Written:
        """What is on disk and committed.  Raises if nothing of the batch could be committed."""
        dropped = [
            rows.drop_block(job.file.block.hash)
            for job in jobs
            if isinstance(job, Quarantine) and self._quarantine(job.file)
        ]
        for job in jobs:
            if isinstance(job, RemoveAgent) and job.wipe:
                self._to_wipe = True
                self._to_purge.update(job.let_go)
        if purged := not self._to_wipe or self._files.purge(self._to_purge):
            self._to_purge.clear()
        day = self._tend(jobs)
        self._make_room(jobs)
        if whose := names(self._wanted(jobs)):
            self._index.commit(whose)  # no file is ever there without
        written = self._files.write(self._wanted(jobs), self._refuses)
        if num_bytes := sum(file.file_bytes for file in written.values()):
            self._budget.days.wrote(num_bytes)
        touched = [rows.set_used(*use) for use in self._catalog.take_touched()]
        changed, doomed = changes(jobs, written)
        done = [rows.drop_doomed(block_hash) for block_hash in self._removed]
        today = self._budget.days.rows() if day or num_bytes else []
        credit = self._credit(jobs, written)
        flushed = any(isinstance(job, Barrier) for job in jobs)  # else reads alone can wait
        if (statements := dropped + done + today + touched + changed + credit) or flushed:
            reads = [rows.set_read(*read) for read in self._catalog.take_reads()]
            self._index.commit(statements + reads)
            self._removed = []
        self._remove(doomed)
        if self._to_wipe:
            self._to_wipe = not (self._wipe() and purged)
        self._metrics.blocks_written.inc(len(written))
        self._metrics.bytes_written.inc(num_bytes)
        return written

    def _wanted(self, jobs: list[Job]) -> Iterator[WriteBlock]:
        for job in jobs:
            if isinstance(job, WriteBlock) and self._catalog.wanted(job.ticket):
                yield job

    def _refuses(self, num_bytes: int) -> str | None:
        return self._budget.refuses(num_bytes, self._catalog.disk_bytes)

    # ── limits ───────────────────────────────────────────────────────────────────────────────

    def _tend(self, jobs: list[Job]) -> bool:
        """At start and on a new day: what is too old goes.  Says whether it is a new day."""
        new_day = self._budget.begin(self._catalog.clock)
        if new_day or not self._tended:
            self._tended = True
            self._files.cap_quarantine()
            self._evict(jobs, self._eviction.expire(self._budget.expired()), "max_age_days")
        return new_day

    def _make_room(self, jobs: list[Job]) -> None:
        coming = sum(size_of_file(job.block, job.spec) for job in self._wanted(jobs))
        if lack := self._budget.lack(self._catalog.disk_bytes, coming):
            self._evict(jobs, self._eviction.make_room(lack.num_bytes), lack.reason)

    def _evict(self, jobs: list[Job], files: list[BlockFile], reason: str) -> None:
        """Delete files that the catalog has forgotten, before anything takes their room."""
        if not files:
            return
        job = DeleteBlocks(tuple(file.block.hash for file in files))
        jobs.append(job)  # it is owed if the transaction fails
        statements, doomed = changes([job], {})
        self._index.commit(statements)
        jobs.remove(job)
        free = self._budget.free()
        self._remove(doomed)
        if reason == "min_free_bytes":
            num_bytes = sum(file.file_bytes for file in files)
            self._budget.made_room(num_bytes, self._budget.free() - free)
        self._metrics.evicted_blocks.labels(reason).inc(len(files))
        self._on_cut(self._eviction.take_cut())

    # ── the rest of a batch ──────────────────────────────────────────────────────────────────

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

    def _remove(self, doomed: set[BlockHash]) -> None:
        gone = self._files.remove(doomed)
        self._removed += gone
        self._stuck |= doomed.difference(gone)

    def _wipe(self) -> bool:
        """What was removed is nowhere: no name comes back after a crash, no row is in the log."""
        try:
            self._files.sync(self._removed)
            self._index.commit([rows.drop_doomed(h) for h in self._removed])
            self._removed = []
            return self._index.wipe_log() and not self._stuck
        except (OSError, sqlite3.Error) as error:
            self._files.complain(error)
            return False

    def _quarantine(self, file: BlockFile) -> bool:
        """Move a bad file away unless a good one has replaced it.  Says whether the row goes."""
        if not self._catalog.forget_file(file):
            return False
        self._files.quarantine(file.block.hash)
        return True

    def _settle(self, job: WriteBlock, file: BlockFile | None) -> None:
        present = self._catalog.settle(job.ticket, file)
        try:
            job.on_written(job.block.hash, present)
        except Exception as error:  # theirs; the other callbacks of the batch are still owed
            self._callback_failures.add(type(error).__name__, trace=trace(error))
