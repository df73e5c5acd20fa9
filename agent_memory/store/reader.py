"""The threads that read block files back.

Knows that a doubtful file is a miss: counted by reason, given to the writer to quarantine, never
returned.  `read` is for any thread; `deliver` is called on a reader thread.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Lock, Thread

from agent_memory.block import Block, Loss
from agent_memory.kv_spec import KVSpec
from agent_memory.metrics import Metrics
from agent_memory.store.catalog import Catalog
from agent_memory.store.complaints import Complaints, trace
from agent_memory.store.files import Bytes, read_file
from agent_memory.store.format import BlockFile, Rejected, decode
from agent_memory.store.jobs import Quarantine
from agent_memory.store.scrub import OUR_FAULT
from agent_memory.store.slots import Slots
from agent_memory.store.state_dir import StateDir
from agent_memory.store.writer import Writer

NUM_THREADS = 2
READY_BYTES_PER_S = 50 << 20
"""By each thread, while it has nothing to read."""

Deliver = Callable[[Block, Bytes | None], None]


@dataclass(frozen=True, slots=True)
class Read:
    block: Block
    spec: KVSpec
    deliver: Deliver


@dataclass(frozen=True, slots=True)
class GetReady:
    """Nothing to read: only a thread to be woken, so that it makes memory ready."""


class Readers:
    def __init__(self, state: StateDir, catalog: Catalog, writer: Writer, metrics: Metrics) -> None:
        self._state = state
        self._catalog = catalog
        self._writer = writer
        self.slots = Slots()
        self._rejected = Complaints("block_rejected", metrics.restore_rejected)
        self._deliver_failures = Complaints("deliver_failed")
        self._queue: SimpleQueue[Read | GetReady | None] = SimpleQueue()
        self._lock = Lock()
        self._closing = False  # guarded by the lock, with the order of the queue
        self._threads = [
            Thread(target=self._run, name=f"store-reader-{n}") for n in range(NUM_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def read(self, block: Block, spec: KVSpec, deliver: Deliver) -> None:
        """`deliver` is called once: with the payload, a fresh array of the caller's own, or None.

        When the readers are closing it is called here and now, with None.
        """
        with self._lock:
            if not self._closing:
                self._queue.put(Read(block, spec, deliver))
                return
        deliver(block, None)

    def expect(self, file_bytes: int, spare_bytes: int) -> None:
        """Files of this size will be read: so much memory is made ready for them soon."""
        self.slots.resize(file_bytes, spare_bytes)
        self._queue.put(GetReady())

    def close(self, timeout_s: float) -> bool:
        """Reads already asked for are answered first.  Says whether the threads have ended."""
        with self._lock:
            if not self._closing:
                self._closing = True
                for _ in self._threads:
                    self._queue.put(None)
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while self._answer(self._next()):  # no local may keep a payload while it is empty
            pass

    def _next(self) -> Read | GetReady | None:
        """While there is nothing to read memory is made ready, a little now and then."""
        while self.slots.wants_more:
            try:
                return self._queue.get(timeout=self.slots.step_bytes / READY_BYTES_PER_S)
            except Empty:
                self.slots.add()
        return self._queue.get()

    def _answer(self, job: Read | GetReady | None) -> bool:
        """Says whether there may be more to come."""
        if not isinstance(job, Read):
            return job is not None
        try:
            job.deliver(job.block, self._payload(job.block, job.spec))
        except Exception as error:  # theirs; the other reads are still owed
            self._deliver_failures.add(type(error).__name__, trace=trace(error))
        return True

    def _payload(self, block: Block, spec: KVSpec) -> Bytes | None:
        name, loss = block.hash.hex(), Loss.DAMAGED
        file = self._catalog.file(block.hash)
        if file is None:
            self._rejected.add("missing", block=name)
            return None
        try:
            return self._load(file, spec)
        except Rejected as error:
            self._rejected.add(error.reason, block=name)
        except FileNotFoundError:
            if self._catalog.file(block.hash) is not file:
                return None  # it was let go of meanwhile
            loss = Loss.MISSING
            self._rejected.add("missing", block=name)
        except Exception as error:  # whatever reading does, it is a miss and not the thread's end
            self._rejected.add("io", block=name, error=trace(error))
            if isinstance(error, MemoryError) or getattr(error, "errno", None) in OUR_FAULT:
                return None
        self._catalog.gone.note(block, loss)
        # First the order to quarantine, then out of sight: a block that is put again after this
        # is written after the bad file has gone.
        self._writer.submit(Quarantine(file))
        self._catalog.forget_file(file)
        return None

    def _load(self, file: BlockFile, spec: KVSpec) -> Bytes:
        path = self._state.block_path(file.block.hash)
        if path.lstat().st_size != file.file_bytes:
            raise Rejected("size")
        payload = decode(read_file(path, self.slots.take), file, spec)
        self._catalog.was_read(file)
        return payload
