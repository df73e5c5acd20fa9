"""The threads that read block files back.

Knows that a doubtful file is a miss: counted by reason, given to the writer to quarantine, never
returned.  `read` is for any thread; `deliver` is called on a reader thread.
"""

import errno
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Lock, Thread

import structlog

from agent_memory.block import Block
from agent_memory.kv_spec import KVSpec
from agent_memory.metrics import Metrics
from agent_memory.store.catalog import Catalog
from agent_memory.store.files import Bytes, read_file
from agent_memory.store.format import BlockFile, Rejected, decode
from agent_memory.store.state_dir import StateDir
from agent_memory.store.writer import Quarantine, Writer

NUM_THREADS = 2

Deliver = Callable[[Block, Bytes | None], None]

_OUR_FAULT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
"""The process is short of something; the file may be good."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Read:
    block: Block
    spec: KVSpec
    deliver: Deliver


class Readers:
    def __init__(self, state: StateDir, catalog: Catalog, writer: Writer, metrics: Metrics) -> None:
        self._state = state
        self._catalog = catalog
        self._writer = writer
        self._metrics = metrics
        self._queue: SimpleQueue[Read | None] = SimpleQueue()
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
        while job := self._queue.get():
            payload = self._payload(job.block, job.spec)
            try:
                job.deliver(job.block, payload)
            except Exception:  # theirs; the other reads are still owed
                log.exception("deliver_failed", block=job.block.hash.hex())

    def _payload(self, block: Block, spec: KVSpec) -> Bytes | None:
        file = self._catalog.file(block.hash)
        if file is None:
            self._miss(block, "missing")
            return None
        try:
            return self._load(file, spec)
        except Rejected as error:
            self._miss(block, error.reason)
        except FileNotFoundError:
            self._miss(block, "missing")
        except Exception as error:  # whatever reading does, it is a miss and not the thread's end
            self._miss(block, "io", error)
            if isinstance(error, MemoryError) or getattr(error, "errno", None) in _OUR_FAULT:
                return None
        # First the order to quarantine, then out of sight: a block that is put again after this
        # is written after the bad file has gone.
        self._writer.submit(Quarantine(file))
        self._catalog.forget_file(file)
        return None

    def _load(self, file: BlockFile, spec: KVSpec) -> Bytes:
        path = self._state.block_path(file.block.hash)
        if path.lstat().st_size != file.file_bytes:
            raise Rejected("size")
        return decode(read_file(path), file, spec)

    def _miss(self, block: Block, reason: str, error: Exception | None = None) -> None:
        self._metrics.restore_rejected.labels(reason=reason).inc()
        log.warning("block_rejected", block=block.hash.hex(), reason=reason, exc_info=error)
