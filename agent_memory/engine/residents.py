"""The models in memory, each with its own step loop, on one ledger and one pool.

Knows how a model comes, goes and takes its turn.  Which ones are wanted is decided elsewhere.

    a turn    one step of the load under way  ·  a turn of every loop that has work, in their order

So a model that loads holds the others up for one layer's weights, or one forward, at a time.
Engine thread only, but for what the ledger lets others read.
"""

import gc
import traceback
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass

import structlog

from agent_memory.config import Config
from agent_memory.engine import budget
from agent_memory.engine.ledger import Ledger, account
from agent_memory.engine.limits import ModelInfo
from agent_memory.engine.mailbox import Mailbox, Stream
from agent_memory.engine.memory import Memory
from agent_memory.engine.phase import LoadCancelled
from agent_memory.engine.room import Cost
from agent_memory.engine.scheduler import Scheduler
from agent_memory.engine.step_loop import StepLoop
from agent_memory.errors import AgentMemoryError
from agent_memory.kvcache.block_pool import BlockPool
from agent_memory.metrics import Metrics
from agent_memory.model import footprint, loader, logprobs
from agent_memory.model.grammar import Constraint
from agent_memory.model.loader import LoadedModel, Prepared, Tell
from agent_memory.request import GenerateRequest
from agent_memory.store.block_store import BlockStore

MAX_RUNNING = 32
SPARE_SHARE = 8
MOST_SPARE_BYTES = 256 << 20
"""One part in so many of the pool's bytes is kept ready to read blocks into, and no more: it is
memory that does nothing else."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Load:
    name: str
    steps: Generator[None, None, ModelInfo]
    done: "Future[ModelInfo]"


class Residents:
    """`loops`: by the model's name, the one loaded last comes last."""

    def __init__(
        self, config: Config, store: BlockStore, metrics: Metrics, mailbox: Mailbox
    ) -> None:
        self._config = config
        self._store = store
        self._metrics = metrics
        self._mailbox = mailbox
        self._spare_bytes = min(config.pool_bytes // SPARE_SHARE, MOST_SPARE_BYTES)
        self.pool = BlockPool(config.pool_bytes - self._spare_bytes)
        self.ledger = Ledger(0, {})
        self.whole_bytes = 0  # for models and what they remember, with none loaded
        self.loops: dict[str, StepLoop] = {}
        self._load: Load | None = None

    def open(self) -> None:
        self.ledger = budget.open_ledger(self._config.memory_bytes, self._spare_bytes)
        self.whole_bytes = self.ledger.spare_bytes
        self._metrics.memory_budget_bytes.set(self.ledger.budget_bytes)

    # ── a turn ───────────────────────────────────────────────────────────────────────────────

    @property
    def is_loading(self) -> bool:
        """Any thread."""
        return self._load is not None

    @property
    def is_idle(self) -> bool:
        return not any(len(loop.scheduler) for loop in self.loops.values())

    @property
    def is_stepping(self) -> bool:
        return any(loop.has_work for loop in self.loops.values())

    @property
    def has_work(self) -> bool:
        return self._load is not None or self.is_stepping

    def something_changed(self) -> None:
        for loop in self.loops.values():
            loop.something_changed()

    def turn(self) -> None:
        self._step_load()
        for loop in list(self.loops.values()):
            if loop.has_work:
                loop.turn()
                self._tell_others(loop)
        self._tell_metrics()

    def _tell_others(self, worked: StepLoop) -> None:
        """What one gave back another may take."""
        for loop in self.loops.values():
            if loop is not worked:
                loop.something_changed()

    def _tell_metrics(self) -> None:
        loops = self.loops.values()
        self._metrics.running.set(sum(len(loop.scheduler.admitted) for loop in loops))
        self._metrics.waiting.set(sum(len(loop.scheduler.waiting) for loop in loops))
        self._metrics.runs.set(sum(loop.memory.num_runs for loop in loops))
        self._metrics.pool_bytes.set(self.pool.num_bytes)
        self._metrics.memory_used_bytes.set(self.ledger.used_bytes)
        self._metrics.models_resident.set(len(loops))

    def check_if_idle(self) -> None:
        """What is found is told; commands must still be taken after it."""
        if not self.is_idle:
            return
        self._tell_metrics()  # what commands changed: there may be no turn for a long time
        try:
            assert not self.ledger.holders()
            for loop in self.loops.values():
                loop.check()
        except AssertionError:
            log.exception("check_failed")

    # ── requests ─────────────────────────────────────────────────────────────────────────────

    def submit(
        self, name: str, request: GenerateRequest, stream: Stream, constraint: Constraint | None
    ) -> None:
        self.loops[name].submit(request, stream, constraint)

    def cancel(self, name: str, request_id: str) -> None:
        if loop := self.loops.get(name):
            loop.cancel(request_id)

    def expect(self, name: str, agent_id: str) -> None:
        if loop := self.loops.get(name):
            loop.memory.expect(agent_id)

    def warm(self, name: str, agent_id: str, done: Callable[[], object]) -> None:
        if loop := self.loops.get(name):
            loop.memory.warm(agent_id, done)
        else:
            done()

    def is_answering(self, agent_id: str) -> bool:
        sequences = (seq for loop in self.loops.values() for seq in loop.scheduler)
        return any(seq.request.agent == agent_id for seq in sequences)

    def forget(self, agent_id: str) -> None:
        for loop in self.loops.values():
            loop.memory.witness.forget(agent_id)

    def end_waiting(self) -> int:
        return sum(loop.end_waiting() for loop in self.loops.values())

    def end_all(self) -> int:
        return sum(loop.end_all() for loop in self.loops.values())

    def fail_all(self) -> None:
        for loop in self.loops.values():
            loop.fail_all()

    # ── models come ──────────────────────────────────────────────────────────────────────────

    def reserve(self, name: str, nbytes: int) -> bool:
        """Have so much for a model that is to be loaded; False while others need it.

        Where less would do for the others nobody new begins until then, or until it is given up
        with `unload`: else it would wait for as long as there is always one more.
        """
        spare_bytes = self.ledger.spare_bytes - nbytes
        loops = self.loops.values()
        if spare_bytes < 0 or not all(loop.room.would_do(spare_bytes) for loop in loops):
            self._set_rooms(closed=False)
            return False
        for loop in loops:
            loop.room.measure()
        missing = nbytes - self.ledger.free_bytes
        if missing > 0 and missing > self.pool.idle_bytes:
            self._set_rooms(closed=True)
            return False
        self._set_rooms(closed=False)
        self.pool.resize(min(self.pool.limit_bytes, self.pool.num_bytes - missing))
        self.ledger.measure("pool", self.pool.num_bytes)
        self.ledger.fix(account("weights", name), nbytes)
        return True

    def _set_rooms(self, *, closed: bool) -> None:
        for loop in self.loops.values():
            loop.room.closed = closed
            loop.something_changed()

    def begin(self, prepared: Prepared, tell: Tell) -> "Future[ModelInfo]":
        """Its room was reserved.  The future raises what went wrong, of which nothing is left."""
        assert self._load is None and prepared.name not in self.loops
        done: Future[ModelInfo] = Future()
        done.set_running_or_notify_cancel()  # who gives up waiting must not end it for the engine
        self._load = Load(prepared.name, self._loading(prepared, tell), done)
        return done

    def end_load(self) -> None:
        if self._load is not None:
            self._give_up(LoadCancelled("The server is shutting down."))

    def _step_load(self) -> None:
        if self._load is None:
            return
        try:
            next(self._load.steps)
        except StopIteration as end:
            load, self._load = self._load, None
            load.done.set_result(end.value)
        except Exception as error:  # whatever it is, the thread must go on to serve the others
            self._give_up(error)

    def _loading(self, prepared: Prepared, tell: Tell) -> Generator[None, None, ModelInfo]:
        config = self._config
        loaded = yield from loader.load(prepared, config.kv_bits, config.kv_group_size, tell)
        proven, spec = loaded.proven, loaded.proven.spec
        fixed_bytes, cost = yield from budget.enter(self.ledger, loaded, config.step_tokens)
        yield
        loop = self._loop(loaded, cost)
        self._store.expect(spec, self._spare_bytes)
        _leave_alone_what_exists()
        self.loops[loaded.id] = loop
        return ModelInfo(
            id=loaded.id,
            context_length=loaded.context_length,
            made_for=prepared.made_for,
            vocab_size=proven.vocab_size,
            defaults=loaded.defaults,
            kv={
                "bits": config.kv_bits,
                "group_size": config.kv_group_size,
                "bytes_per_token": spec.bytes_per_token,
                "mode": proven.mode,
                "decode_reads": proven.read,
                "fingerprint": spec.fingerprint.hex()[:16],
            },
            self_test_difference=proven.worst_difference,
            spec=spec,
            cost=cost,
            fixed_bytes=fixed_bytes,
        )

    def _loop(self, loaded: LoadedModel, cost: Cost) -> StepLoop:
        proven = loaded.proven
        memory = Memory(proven.spec, self.pool, self._store, self._metrics, self._mailbox.send)
        most_scored = logprobs.most_rows(proven.vocab_size)
        scheduler = Scheduler(self._config.step_tokens, MAX_RUNNING, most_scored)
        return StepLoop(loaded, memory, scheduler, self.ledger, cost, self._mailbox, self._metrics)

    def _give_up(self, error: Exception) -> None:
        """What was loaded goes at once: no frame of it may stay, not even for who reads of it."""
        assert self._load is not None
        load, self._load = self._load, None
        known = isinstance(error, AgentMemoryError)
        if not known:
            log.error("model_load_raised", model=load.name, exc_info=error)
        load.steps.close()
        _without_frames(error)
        self._forget(load.name)
        load.done.set_exception(error)

    # ── models go ────────────────────────────────────────────────────────────────────────────

    def unload(self, name: str) -> bool:
        """False while something is under way in it."""
        loop = self.loops.get(name)
        if loop is not None and not loop.is_quiet:
            return False
        del loop  # or it would be there still
        self._forget(name)
        return True

    def _forget(self, name: str) -> None:
        self.loops.pop(name, None)
        budget.leave(self.ledger, name)
        self._set_rooms(closed=False)
        gc.unfreeze()
        footprint.give_back()
        if self.loops:
            gc.freeze()
            self._store.expect(list(self.loops.values())[-1].memory.spec, self._spare_bytes)
        self._tell_metrics()

    def evict(self) -> tuple[int, int]:
        """At the end: (blocks, of these held)."""
        for loop in self.loops.values():
            loop.memory.clear()
        blocks = len(self.pool)
        return blocks, self.pool.clear()

    def drop_all(self) -> None:
        """At the end, whatever is under way."""
        self.end_load()
        self.loops.clear()
        gc.unfreeze()
        gc.collect()


def _leave_alone_what_exists() -> None:
    """Modules and models stay: looking through them for garbage, again and again while requests
    are served, would stop every thread for 50 to 100 ms."""
    gc.collect()
    gc.freeze()


def _without_frames(error: BaseException | None) -> None:
    """What the error and its causes hold of the places they passed."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
