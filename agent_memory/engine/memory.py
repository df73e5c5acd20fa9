"""What is remembered: finds a prompt's beginning in pool and store and brings it back.

The one bridge between the block pool (host bytes in RAM), the block store (files) and sequences.
Of one model.  Knows nothing of steps.  Engine thread only; the store's threads answer by `post`.

    match     the prompt's chain of full blocks in the pool, else in the store; then of the blocks
              that follow the last match the one that shares most tokens: see matching.py
    restore   payloads from pool and disk are written into one run, at most so many bytes a turn
    commit    the way back: see commits.py
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from weakref import WeakValueDictionary

import numpy as np
import structlog

from agent_memory.block import BLOCK_TOKENS, Block, BlockHash, Loss, in_blocks
from agent_memory.engine.commits import Commits
from agent_memory.engine.matching import Matching
from agent_memory.engine.reads import Post, Reads
from agent_memory.engine.restore import MOST_COPIED, Restore, Restored, Span, run_key
from agent_memory.engine.sequence import Sequence, State
from agent_memory.engine.witness import Witness
from agent_memory.failpoint import failpoint
from agent_memory.kv_spec import KVSpec
from agent_memory.kvcache.block_pool import BlockPool
from agent_memory.kvcache.run import Run, RunBuilder
from agent_memory.kvcache.sequence_kv import SequenceKV
from agent_memory.metrics import Metrics
from agent_memory.request import Compared, Finding
from agent_memory.store.block_store import BlockStore

log = structlog.get_logger(__name__)

AHEAD_BYTES = 64 << 20
"""Of a chain are read before its request is there: it may turn out to be about something else."""


class Memory:
    def __init__(
        self, spec: KVSpec, pool: BlockPool, store: BlockStore, metrics: Metrics, post: Post
    ) -> None:
        self.spec = spec
        self.pool = pool
        self.store = store
        self.metrics = metrics
        self._post = post
        self._runs: WeakValueDictionary[BlockHash, Run] = WeakValueDictionary()
        self._restores: dict[BlockHash, Restore] = {}
        self._reads = Reads(spec, pool, store, post)
        self.witness = Witness(spec.fingerprint, pool, store)
        self._matching = Matching(spec, pool, store)
        self.commits = Commits(spec, pool, store, metrics, post, self.witness, self._matching)

    # ── match ────────────────────────────────────────────────────────────────────────────────

    def match(self, seq: Sequence) -> list[Span]:
        """What is remembered of it and can be gone on from."""
        return self._matching.usable(self._matching.kv_of(seq.matchable, seq.root))

    def remembered(self, seq: Sequence) -> int:
        spans = self.match(seq)
        return spans[-1].start + spans[-1].count if spans else 0

    def expect(self, agent_id: str) -> None:
        """A request of this agent will come in a moment: most likely it goes on from its head."""
        self._reads.ahead(self._newest_chain(agent_id), AHEAD_BYTES)

    def warm(self, agent_id: str, done: Callable[[], object]) -> None:
        """Somebody wants this agent's newest head in RAM, all that the pool has room for."""
        self.pool.use(chain := self._newest_chain(agent_id))
        self._reads.bring(chain, done)

    def _newest_chain(self, agent_id: str) -> tuple[Block, ...]:
        """Of this model."""
        agent = self.store.agents.get(agent_id)
        heads = agent.heads if agent else ()
        own = (
            (*head.chain, *head.checkpoints)
            for head in heads
            if head.fingerprint == self.spec.fingerprint
        )
        return next(own, ())

    # ── restore ──────────────────────────────────────────────────────────────────────────────

    def begin(self, seq: Sequence) -> Restored | None:
        """Give the sequence its KV now, or (None) when its blocks have been brought together."""
        seq.looked_at = time.monotonic()
        found = self._matching.kv_of(seq.matchable, seq.root)
        spans = self._matching.usable(found)
        seq.compared = self._compare(seq, found, sum(span.count for span in spans))
        if not spans:
            return self._start(seq, None, [], set())
        blocks = [span.block for span in spans]
        self.pool.use(blocks)
        self.store.touch([block.hash for block in blocks])
        if run := self._runs.get(run_key(spans)):
            return self._start(seq, run, spans, set())
        seq.move(State.RESTORING)
        restore = self._restores.get(run_key(spans)) or self._open(spans)
        restore.waiting.append(seq)
        return None

    def _compare(self, seq: Sequence, found: list[Span], usable: int) -> Compared:
        matched = sum(span.count for span in found)
        if seq.still_to_score:
            return Compared(matched, Finding.NOT_LOOKED)
        blocks = [span.block for span in found]
        wanted = seq.prompt_bytes[:-4]
        compared = self.witness.compare(seq.request.agent, seq.root, wanted, matched, blocks)
        return replace(compared, went_back=matched - usable if self.spec.states else 0)

    def _open(self, spans: list[Span]) -> Restore:
        length = spans[-1].start + spans[-1].count
        absent = {i for i, span in enumerate(spans) if self._reads.from_disk(span.block.hash)}
        restore = Restore(
            spans, RunBuilder(self.spec, length), [], len(spans), absent, time.monotonic()
        )
        self._restores[restore.key] = restore
        for i, span in enumerate(spans):
            if span.block.hash in self.pool:
                self._landed(restore, i, self.pool.hold(span.block.hash), True)
            else:
                self._reads.want(span.block, partial(self._landed, restore, i))
        return restore

    def _landed(self, restore: Restore, i: int, payload: np.ndarray | None, held: bool) -> None:
        restore.missing -= 1
        if payload is None:
            restore.failed.add(i)
        else:
            restore.todo.append((i, payload, held))

    @property
    def can_advance(self) -> bool:
        """Whether there is more to do than to wait for the disk."""
        return any(
            r.todo or r.settled or not (r.builder.grown or r.given_up)
            for r in self._restores.values()
        )

    def advance(self, budget_bytes: int) -> list[Restored]:
        """Make room for runs and write what has landed; -> sequences that can compute now."""
        ready: list[Restored] = []
        for restore in list(self._restores.values()):
            try:
                budget_bytes -= self._advance(restore, budget_bytes)
            except Exception:  # most likely no memory: then nothing is restored
                log.exception("restore_failed", tokens=restore.builder.length)
                restore.given_up = True
            if restore.settled:
                ready += self._complete(restore)
        return ready

    def _advance(self, restore: Restore, budget_bytes: int) -> int:
        """-> bytes of work done."""
        done, builder = 0, restore.builder
        if budget_bytes > 0 and not builder.grown and not restore.given_up:
            failpoint("restore.grow")
            done += builder.grow(budget_bytes)
        while restore.todo and done < budget_bytes and (builder.grown or restore.given_up):
            done += self._write(restore, *restore.todo.popleft())
        return done

    def _write(self, restore: Restore, i: int, payload: np.ndarray, held: bool) -> int:
        span = restore.spans[i]
        if held:
            self.pool.release(span.block.hash)  # the payload itself stays until it is written
        if restore.given_up:
            return 0
        restore.failed.add(i)
        if span.block.is_checkpoint:
            restore.builder.write_checkpoint(payload)
        else:
            restore.builder.write(span.start, span.count, span.block.num_tokens, payload)
        restore.failed.discard(i)  # only what has been written whole is used
        return payload.nbytes

    def _complete(self, restore: Restore) -> list[Restored]:
        """What lies before a block that could not be had is put together anew, from the pool."""
        del self._restores[restore.key]
        self.metrics.restore_time.observe(time.monotonic() - restore.began)
        waiting = [seq for seq in restore.waiting if seq.state is State.RESTORING]
        spans = restore.usable
        if len(spans) < len(restore.spans):
            lost = restore.spans[len(spans)]
            self._note_loss(restore, lost, waiting)
            shorter = self._matching.usable(spans, lost.start + lost.count - 1)
            if shorter:
                return self._again(shorter, waiting, restore.from_disk)
            spans = []
        if not spans:
            return [self._start(seq, None, [], set()) for seq in waiting]
        run = restore.builder.finish()
        self._runs[restore.key] = run
        return [self._start(seq, run, spans, restore.from_disk) for seq in waiting]

    def _note_loss(self, restore: Restore, first: Span, waiting: list[Sequence]) -> None:
        """Less was restored than was found, from the `first` span on that could not be used."""
        loss = Loss.NO_ROOM if restore.given_up else self.store.gone.why(first.block.hash)
        for seq in waiting:
            seq.compared = Compared(first.start, Finding.LOST, loss=loss or Loss.DAMAGED)

    def _again(
        self, spans: list[Span], waiting: list[Sequence], from_disk: set[int]
    ) -> list[Restored]:
        key = run_key(spans)
        if run := self._runs.get(key):
            return [self._start(seq, run, spans, from_disk) for seq in waiting]
        if waiting:
            shorter = self._restores.get(key) or self._open(spans)
            shorter.from_disk |= {i for i in from_disk if i < len(spans)}
            shorter.waiting += waiting
        return []

    def _start(
        self, seq: Sequence, run: Run | None, spans: list[Span], from_disk: set[int]
    ) -> Restored:
        copied = run is not None and run.length <= MOST_COPIED
        seq.kv = SequenceKV(self.spec, run, seq.reserve, seq.marked_at, copied=copied)
        seq.chain = [span.block for span in spans if span.count == BLOCK_TOKENS]
        seq.checkpoints += [span.block for span in spans if span.block.is_checkpoint]
        seq.move(State.RUNNING)
        disk = sum(span.count for i, span in enumerate(spans) if i in from_disk)
        return Restored(seq, seq.kv.length - disk, disk)

    def needs(self, seq: Sequence) -> int:
        """Tokens of new memory that it takes, run and tail, if it begins now."""
        spans = self.match(seq)
        matched = spans[-1].start + spans[-1].count if spans else 0
        if matched <= MOST_COPIED:
            return in_blocks(seq.reserve)
        known = run_key(spans) in self._runs or run_key(spans) in self._restores
        return in_blocks(seq.reserve - matched) + (0 if known else matched)

    def own_tokens(self, seq: Sequence) -> int:
        """Of one that has begun: what its tail has, or is to have, places for."""
        if seq.kv is not None:
            return seq.kv.room
        run = next(r.builder.length for r in self._restores.values() if seq in r.waiting)
        return seq.reserve - run

    @property
    def run_bytes(self) -> int:
        """Of runs in use and of those being put together."""
        under_way = sum(restore.builder.whole_bytes for restore in self._restores.values())
        return under_way + sum(run.nbytes for run in self._runs.values())

    @property
    def num_runs(self) -> int:
        return len(self._runs)

    # ── the end ──────────────────────────────────────────────────────────────────────────────

    def forget_restores(self, seq: Sequence) -> None:
        """The sequence no longer waits; a restore that nobody waits for still completes, unused."""
        for restore in self._restores.values():
            if seq in restore.waiting:
                restore.waiting.remove(seq)

    @property
    def is_quiet(self) -> bool:
        return not self._restores and self._reads.is_quiet

    def clear(self) -> None:
        self._restores.clear()
        self._reads.clear()

    def check(self) -> None:
        self.pool.check()
        self.witness.check()
        for key, restore in self._restores.items():
            assert key == restore.key and 0 <= restore.missing <= len(restore.spans)
