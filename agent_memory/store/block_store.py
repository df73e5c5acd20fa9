"""The store: what of every agent's memory is on disk.

The one door to this package for the engine and the lifespan.  Knows how its parts work together,
and leaves each its own matter: catalog (what is present), agents (who owns it), writer and readers
(threads and files).  Any thread; what is asked here is answered from memory.
"""

import time
from collections.abc import Iterable, Sequence

from agent_memory.block import Block, BlockHash
from agent_memory.kv_spec import KVSpec
from agent_memory.metrics import Metrics
from agent_memory.store.agents import Agents
from agent_memory.store.catalog import Catalog
from agent_memory.store.files import Bytes
from agent_memory.store.format import full_file_bytes
from agent_memory.store.index import Index
from agent_memory.store.reader import Deliver, Readers
from agent_memory.store.recover import recover
from agent_memory.store.state_dir import StateDir
from agent_memory.store.writer import DeleteBlock, OnWritten, RecordHead, WriteBlock, Writer


class BlockStore:
    """`agents` and `gone` are for reading only; what agents own changes through `record`."""

    def __init__(
        self, state: StateDir, index: Index, catalog: Catalog, agents: Agents, metrics: Metrics
    ) -> None:
        self.agents = agents
        self.gone = catalog.gone
        self._catalog = catalog
        self._writer = Writer(state, index, catalog, metrics)
        self._readers = Readers(state, catalog, self._writer, metrics)
        metrics.disk_bytes.set(catalog.disk_bytes)

    @classmethod
    def open(cls, state: StateDir, metrics: Metrics) -> "BlockStore":
        """Put the directory right and start the threads.  Raises StateDirError."""
        return cls(state, *recover(state, metrics), metrics)

    def find(self, block_hash: BlockHash) -> Block | None:
        file = self._catalog.file(block_hash)
        return file.block if file else None

    def children(self, parent: BlockHash) -> list[Block]:
        return self._catalog.children(parent)

    def pending(self, block_hash: BlockHash) -> bool:
        return self._catalog.pending(block_hash)

    def touch(self, hashes: Iterable[BlockHash]) -> None:
        """These were used just now.  On disk with the next batch."""
        self._catalog.touch(hashes)

    def bytes_of(self, hashes: Iterable[BlockHash]) -> int:
        """File bytes of those that are present, each counted once."""
        return self._catalog.bytes_of(hashes)

    @property
    def disk_bytes(self) -> int:
        return self._catalog.disk_bytes

    @property
    def pending_bytes(self) -> int:
        """Payload bytes held for the writer."""
        return self._catalog.pending_bytes

    def expect(self, spec: KVSpec, spare_bytes: int) -> None:
        """Blocks of this model will be read: have so much memory ready for them."""
        self._readers.expect(full_file_bytes(spec), spare_bytes)

    def read(self, block: Block, spec: KVSpec, deliver: Deliver) -> None:
        """`deliver(block, payload | None)` comes once, on a reader thread."""
        self._readers.read(block, spec, deliver)

    def put(self, block: Block, payload: Bytes, spec: KVSpec, on_written: OnWritten) -> None:
        """Begin to write.  The payload must not change until `on_written(hash, present)`.

        That comes once, on the writer thread; on a closed store here and now, with False.
        """
        assert payload.nbytes == spec.payload_bytes(block.num_tokens)
        ticket = self._catalog.expect(block.hash, payload.nbytes)
        if not self._writer.submit(WriteBlock(block, payload, spec, ticket, on_written)):
            on_written(block.hash, self._catalog.settle(ticket, None))

    def record(
        self, agent_id: str, fingerprint: BlockHash, chain: Sequence[Block]
    ) -> tuple[Block, ...]:
        """`chain` is what the agent now has in mind; its blocks were put before.

        Returns the partial blocks this made superfluous.  The store has let go of them.
        """
        assert agent_id.isascii()  # others' blocks share the transaction: nothing in it may be odd
        recorded = self.agents.record(agent_id, fingerprint, tuple(chain), time.time())
        self._writer.submit(RecordHead(agent_id, recorded))
        for block in recorded.superseded:
            self._catalog.forget(block.hash)
            self._writer.submit(DeleteBlock(block.hash))
        return recorded.superseded

    def flush(self, timeout_s: float) -> bool:
        """Whether everything asked for before is settled in time."""
        return self._writer.flush(timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Settle everything and end the threads; again does no harm.  False if not in time."""
        deadline = time.monotonic() + timeout_s
        readers_ended = self._readers.close(timeout_s)
        return self._writer.close(max(0.0, deadline - time.monotonic())) and readers_ended

    def check(self) -> None:
        self._catalog.check()
        self.agents.check()
