"""The store: what of every agent's memory is on disk.

The one door to this package for the engine and the lifespan.  Knows how its parts work together,
and leaves each its own matter: catalog (what is present), agents (who owns it), writer and readers
(threads and files).  Any thread; what is asked here is answered from memory.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from threading import Lock

from agent_memory.block import Block, BlockHash, Loss
from agent_memory.kv_spec import KVSpec
from agent_memory.metrics import Metrics
from agent_memory.store.agents import Agent, Agents, Changed
from agent_memory.store.block_files import BlockFiles
from agent_memory.store.catalog import Catalog
from agent_memory.store.files import Bytes
from agent_memory.store.format import full_file_bytes
from agent_memory.store.heads import Chain, Turn
from agent_memory.store.held import HeldFile
from agent_memory.store.index import Index
from agent_memory.store.jobs import DeleteBlocks, OnWritten, RemoveAgent, SaveAgent, WriteBlock
from agent_memory.store.limits import Budget, Limits
from agent_memory.store.reader import Deliver, Readers
from agent_memory.store.recover import recover
from agent_memory.store.scrub import Scrub, Scrubbed
from agent_memory.store.state_dir import StateDir
from agent_memory.store.writer import Writer

DEFAULT_LIMITS = Limits()
WIPE_AGAIN_S = 0.1


class BlockStore:
    """`agents` and `gone` are for reading only; what agents own changes through the verbs here."""

    def __init__(
        self,
        state: StateDir,
        index: Index,
        catalog: Catalog,
        agents: Agents,
        budget: Budget,
        metrics: Metrics,
    ) -> None:
        self.agents = agents
        self.gone = catalog.gone
        self._state = state
        self._catalog = catalog
        self._budget = budget
        self._verbs = Lock()  # the writer is told of what agents do in the order they do it
        files = BlockFiles(state, metrics)
        self._writer = Writer(files, index, catalog, agents, budget, metrics, self._save_cut)
        self._readers = Readers(state, catalog, self._writer, metrics)
        metrics.disk_bytes.set(catalog.disk_bytes)
        metrics.disk_budget.set(budget.disk_bytes)
        self._scrub = Scrub(state, catalog, self._writer.submit, metrics)
        self._is_idle: Callable[[], bool] = lambda: True
        self._writer.start(self._on_idle)

    @classmethod
    def open(
        cls, state: StateDir, metrics: Metrics, limits: Limits = DEFAULT_LIMITS
    ) -> "BlockStore":
        """Put the directory right and start the threads.  Raises StateDirError."""
        index, catalog, agents, days = recover(state, metrics)
        budget = Budget(limits, state.path, days)
        return cls(state, index, catalog, agents, budget, metrics)

    def find(self, block_hash: BlockHash) -> Block | None:
        file = self._catalog.file(block_hash)
        return file.block if file else None

    def children(self, parent: BlockHash) -> list[Block]:
        return [block for block in self._catalog.children(parent) if not block.is_checkpoint]

    def checkpoints(self, parent: BlockHash) -> list[Block]:
        """Those of fewer than a block's tokens after it."""
        return [block for block in self._catalog.children(parent) if block.is_checkpoint]

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

    def keeps_floor(self, num_bytes: int) -> bool:
        """Whether enough stays free on the disk with so many bytes more.  Asks the disk."""
        return self._budget.keeps_floor(num_bytes)

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

    def hold(self, block: Block) -> HeldFile | None:
        """Its file, whatever becomes of it here; None if there is none.  Disk: a worker thread."""
        file = self._catalog.file(block.hash)
        try:
            return HeldFile(self._state, file) if file else None
        except FileNotFoundError:
            return None

    def put(
        self,
        block: Block,
        payload: Bytes,
        spec: KVSpec,
        on_written: OnWritten,
        agent_id: str | None = None,
    ) -> None:
        """Begin to write, in the name of `agent_id`.

        The payload must not change until `on_written(hash, present)`.  That comes once, on the
        writer thread; on a closed store here and now, with False.
        """
        assert payload.nbytes == spec.bytes_of(block)
        ticket = self._catalog.expect(block, payload.nbytes)
        job = WriteBlock(block, payload, spec, ticket, on_written, agent_id)
        if not self._writer.submit(job):
            on_written(block.hash, self._catalog.settle(ticket, None))

    def give_up(self, blocks: Iterable[Block]) -> None:
        """They were put for a conversation that will not be, and come each after those that follow
        it.  What nobody has in mind and nothing follows goes."""
        with self._verbs:
            let_go = self._let_go((block,) for block in blocks)
            self._writer.submit(DeleteBlocks(tuple(block.hash for block in let_go)))

    # ── what agents own: in effect at once, on disk with the writer's next batch ─────────────

    def record(
        self,
        agent_id: str,
        fingerprint: BlockHash,
        chain: Sequence[Block],
        turn: Turn | None = None,
        checkpoints: Sequence[Block] = (),
        passed: Sequence[Block] = (),
    ) -> Chain:
        """`chain` is what the agent now has in mind; its blocks were put before.

        `turn`: (end of the prompt, end of the answer).  `checkpoints`: all of this conversation
        that are to be kept, put before too.  `passed`: blocks put on the way that are of no use
        now.  Returns the blocks and checkpoints that are now nobody's and of no use.  The store has
        let go of them.
        """
        _check_name(agent_id)
        with self._verbs:
            changed = self.agents.record(
                *(agent_id, fingerprint, tuple(chain), time.time(), turn, tuple(checkpoints)),
                passed=tuple(passed),
            )
            let_go = self._save(changed)
        self._note_evicted(let_go, chain)
        return let_go

    def _note_evicted(self, let_go: Chain, chain: Sequence[Block]) -> None:
        """Older conversations that newer ones pushed out; not the beginnings of what has grown."""
        now = {block.parent: block.tokens for block in chain}
        for block in let_go:
            if not now.get(block.parent, b"").startswith(block.tokens):
                self.gone.note(block, Loss.EVICTED)

    def adopt(
        self,
        agent_id: str,
        fingerprint: BlockHash,
        chain: Sequence[Block],
        turns: Iterable[Turn] = (),
        num_tokens: int | None = None,
        checkpoints: Sequence[Block] = (),
    ) -> Agent:
        """A conversation from elsewhere is the agent's newest head; its blocks and checkpoints were
        put before.

        `num_tokens`: how many of the chain's tokens it uses, None for all.
        """
        _check_name(agent_id)
        with self._verbs:
            changed = self.agents.adopt(
                *(agent_id, fingerprint, tuple(chain), time.time(), turns, num_tokens),
                checkpoints=tuple(checkpoints),
            )
            self._save(changed)
            return changed.agent

    def fork(self, agent_id: str, new_id: str, head_id: str | None = None) -> Agent:
        """A new agent with the same conversation; nothing is copied.

        Raises NotFound; Conflict if there is one of that name.
        """
        _check_name(new_id)
        with self._verbs:
            changed = self.agents.fork(agent_id, new_id, head_id, time.time())
            self._save(changed)
            return changed.agent

    def rewind(self, agent_id: str, num_tokens: int, head_id: str | None = None) -> Agent:
        """Forget what comes after so many tokens.  The head is then the newest.

        Raises NotFound; Conflict if it has fewer.
        """
        with self._verbs:
            changed = self.agents.rewind(agent_id, num_tokens, head_id, time.time())
            self._save(changed)
            return changed.agent

    def set_pinned(self, agent_id: str, pinned: bool) -> Agent:
        """Raises NotFound."""
        with self._verbs:
            changed = self.agents.set_pinned(agent_id, pinned)
            self._save(changed)
            return changed.agent

    def remove(self, agent_id: str) -> set[BlockHash]:
        """Every block and checkpoint that was this agent's alone; the store has let go of them.

        Raises NotFound.  Once it is `saved` no file, row or piece of the log tells of them.
        """
        with self._verbs:
            changed = self.agents.remove(agent_id)
            let_go = tuple(block.hash for block in self._let_go(changed.loose))
            self._writer.submit(RemoveAgent(agent_id, let_go, wipe=True))
            return set(let_go)

    def _save_cut(self, agent_ids: set[str]) -> None:
        """Writer thread.  Each head's own deletions are on their way already."""
        with self._verbs:
            for agent_id in agent_ids:
                agent = self.agents.get(agent_id)
                self._writer.submit(SaveAgent(agent) if agent else RemoveAgent(agent_id))

    def _save(self, changed: Changed) -> Chain:
        let_go = self._let_go(changed.loose)
        self._writer.submit(SaveAgent(changed.agent, tuple(block.hash for block in let_go)))
        return let_go

    def _let_go(self, loose: Iterable[Chain]) -> Chain:
        """Forget, leaf first, what nobody owns any more and nothing follows."""
        blocks = dict[BlockHash, Block]()
        for chain in loose:
            for block in reversed(chain):
                if self.agents.owns(block.hash):
                    break
                if self._catalog.forget_leaf(block.hash):
                    blocks[block.hash] = block
        return tuple(blocks.values())

    def scrub(self, num_files: int) -> Scrubbed:
        """Read the files that were read longest ago, and quarantine the bad.  The caller's thread;
        disk."""
        return self._scrub.run(num_files)

    def scrub_while(self, is_idle: Callable[[], bool]) -> None:
        """From now on only then are files read for no other reason than to know that they are good.

        `is_idle` is asked on the writer thread.
        """
        self._is_idle = is_idle

    def _on_idle(self, until: int) -> bool:
        return not self._is_idle() or self._scrub.run(1, until).num_read > 0

    def flush(self, timeout_s: float) -> bool:
        """Whether everything asked for before is settled in time."""
        return self._writer.flush(timeout_s)

    def saved(self, timeout_s: float) -> bool:
        """Whether in time all that agents did before is on disk, and nothing is left of what was
        removed, in files, rows and log.  Who is in the way is waited for.

        Of blocks `on_written` tells.
        """
        deadline = time.monotonic() + timeout_s
        while self._writer.flush(max(0.0, deadline - time.monotonic())):
            if not self._writer.owes:
                return True
            time.sleep(WIPE_AGAIN_S)
        return False

    def close(self, timeout_s: float) -> bool:
        """Settle everything and end the threads; again does no harm.  False if not in time."""
        deadline = time.monotonic() + timeout_s
        readers_ended = self._readers.close(timeout_s)
        return self._writer.close(max(0.0, deadline - time.monotonic())) and readers_ended

    def check(self) -> None:
        self._catalog.check()
        self.agents.check()


def _check_name(agent_id: str) -> None:
    """Others' blocks share the transaction: nothing in it may be odd."""
    assert agent_id.isascii()
