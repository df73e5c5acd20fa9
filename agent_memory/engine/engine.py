"""The engine as the event loop sees it: a thread, its phase, and requests as streams of events.

The thread lives from `start` to `release`: it loads the model, steps while there is work, and stays
for unloading and freeing, because MLX arrays must die where they were made.  Methods are for the
event loop; what starts with an underscore and says so runs on the engine thread.
"""

import asyncio
import gc
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import TypeVar

import mlx.core as mx
import structlog

from agent_memory.config import Config
from agent_memory.engine import budget, limits
from agent_memory.engine.agent_verbs import AgentVerbs
from agent_memory.engine.heartbeat import Heartbeat, Trouble
from agent_memory.engine.limits import ModelInfo, Queue
from agent_memory.engine.mailbox import Mailbox
from agent_memory.engine.memory import Memory
from agent_memory.engine.phase import LoadCancelled, Note, Phase, refusal
from agent_memory.engine.scheduler import Scheduler
from agent_memory.engine.step_loop import StepLoop
from agent_memory.engine.transfer import Transfer
from agent_memory.errors import AgentMemoryError, EngineFailed
from agent_memory.failpoint import failpoint
from agent_memory.kvcache.block_pool import BlockPool
from agent_memory.metrics import Metrics
from agent_memory.model import loader, logprobs
from agent_memory.model.grammar import Constraint, Grammars
from agent_memory.model.loader import LoadedModel
from agent_memory.model.tokenizer import ChatTokenizer
from agent_memory.request import Conversation, Event, Failed, Finished, GenerateRequest, Prompt
from agent_memory.store.block_store import BlockStore

MAX_RUNNING = 32
SPARE_SHARE = 8
"""One part in so many of the pool's bytes is kept ready to read blocks into."""

T = TypeVar("T")
log = structlog.get_logger(__name__)


class Engine:
    """`note`: as the type says, from the event loop and from the engine thread."""

    def __init__(
        self,
        config: Config,
        store: BlockStore,
        metrics: Metrics,
        note: Note = lambda phase, step: None,
    ) -> None:
        self.model_id = config.model
        self.phase = Phase.STARTING
        self.progress: dict[str, object] = {}
        self.failure: str | None = None
        self.model: ModelInfo | None = None
        self.queue = Queue(config.max_requests)
        self.heartbeat = Heartbeat()
        self._note = note
        self._lost: Trouble | None = None  # the thread was given up
        self._config = config
        self._store = store
        self._metrics = metrics
        self._pool = BlockPool(config.pool_bytes - config.pool_bytes // SPARE_SHARE)
        self._mailbox = Mailbox()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loaded: LoadedModel | None = None
        self._steps: StepLoop | None = None  # engine thread
        self._grammars: Grammars | None = None
        self._settled = asyncio.Event()  # loading has ended, well or not
        self._idle = asyncio.Event()  # the last active request has ended
        self._draining_with = 0  # requests that were here when admission stopped
        self._turned_away: Future[int] | None = None  # of these, how many had not begun
        self._leaving = False
        self.agents = AgentVerbs(store, self._pool, self._mailbox, lambda: self._steps)
        self.transfer = Transfer(store, self._pool, self._mailbox, self.agents)

    # ── life ─────────────────────────────────────────────────────────────────────────────────

    def start(self, loop: asyncio.AbstractEventLoop, *, held: bool = False) -> None:
        """The thread, and unless `held` the model."""
        self._mailbox.connect(loop)
        self._thread.start()
        if held:
            self._move(Phase.HELD)
            self._settled.set()
        else:
            self.load()

    def load(self) -> None:
        assert self.phase in (Phase.STARTING, Phase.HELD)
        self._move(Phase.LOADING)
        self._settled.clear()
        self._mailbox.send(self._load_or_fail)

    def _move(self, phase: Phase) -> None:
        self.phase = phase
        self._note(phase, "")

    async def wait_ready(self, timeout_s: float) -> ModelInfo:
        """Raises Unavailable with the reason."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._settled.wait()
        if self.phase is Phase.READY and self.model is not None:
            return self.model
        raise refusal(self.phase, self.progress, self.failure)

    def _run(self) -> None:
        """The engine thread."""
        try:
            while not self._leaving:
                self._turn_or_fail_all()
        except BaseException:  # nothing may end this thread unsaid
            log.exception("engine_died")
        finally:
            self.heartbeat.ended(as_told=self._leaving)

    def _turn_or_fail_all(self) -> None:
        """Engine thread."""
        try:
            self._turn()
        except Exception:  # a fault of ours that no single request explains
            log.exception("turn_failed")
            failpoint("engine.fail_all")
            if self._steps is not None:
                self._steps.fail_all()

    def _turn(self) -> None:
        """Engine thread.  When the last request has ended every owner of state is checked."""
        steps = None if self.phase is Phase.STOPPED else self._steps
        busy = steps is not None and steps.has_work
        idle = steps is None or not len(steps.scheduler)
        if steps is not None and idle:
            self._check(steps)
        del steps  # a command may drop the model, and then nothing here may hold it
        self.heartbeat.turned(rests=idle and not busy)
        command = self._mailbox.take(wait=not busy)
        self.heartbeat.woken()
        while command is not None:
            command()
            if self._steps is not None:
                self._steps.something_changed()
            command = self._mailbox.take(wait=False)
        if busy and self._steps is not None:
            failpoint("engine.turn")
            self._steps.turn()
            self.heartbeat.stepped()

    def _check(self, steps: StepLoop) -> None:
        """Engine thread.  What is found is told; commands must still be taken after it."""
        try:
            steps.check()
        except AssertionError:
            log.exception("check_failed")

    def _load_or_fail(self) -> None:
        """Engine thread."""
        try:
            self._load()
        except Exception as error:  # whatever it is, the thread must go on to answer and to end
            known = isinstance(error, AgentMemoryError)
            self.failure = str(error) if known else f"{type(error).__name__}: {error}"
            if not isinstance(error, LoadCancelled):
                log.error("model_failed", reason=self.failure, exc_info=None if known else error)
            self._load_settled(Phase.FAILED)

    def _load(self) -> None:
        """Engine thread."""
        started = time.monotonic()

        def progress(step: str) -> None:
            if self.phase is not Phase.LOADING:
                raise LoadCancelled("The server is shutting down.")
            self.progress = {"step": step, "elapsed_s": round(time.monotonic() - started, 1)}
            self._note(self.phase, step)
            log.info("model_loading", model=self.model_id, **self.progress)
            failpoint("engine.load")

        config = self._config
        digests = config.state_dir / "run" / "digests.json"
        loaded = loader.load(self.model_id, config.kv_bits, config.kv_group_size, progress, digests)
        proven = loaded.proven
        spare = config.pool_bytes // SPARE_SHARE
        ledger, cost = budget.plan(loaded, config.memory_bytes, config.step_tokens, spare)
        memory = Memory(proven.spec, self._pool, self._store, self._metrics, self._mailbox.send)
        self._store.expect(proven.spec, spare)
        most_scored = logprobs.most_rows(proven.vocab_size)
        scheduler = Scheduler(config.step_tokens, MAX_RUNNING, most_scored)
        self._loaded = loaded
        self._grammars = Grammars(
            loaded.tokenizer.to_json, proven.vocab_size, loaded.tokenizer.end_of_turn
        )
        self._steps = StepLoop(
            loaded, memory, scheduler, ledger, cost, self._mailbox, self._metrics
        )
        self.model = ModelInfo.of(loaded, config, cost.most_tokens(ledger.spare_bytes))
        log.info(
            "model_ready",
            model=self.model_id,
            context_length=loaded.context_length,
            load_s=round(time.monotonic() - started, 2),
            self_test_difference=proven.worst_difference,
            most_tokens=self.model.most_tokens,
            memory=ledger.figures(),
            **self.model.kv,
        )
        _leave_alone_what_exists()
        self._load_settled(Phase.READY)

    def _load_settled(self, phase: Phase) -> None:
        """Engine thread.  A server that began to drain meanwhile stays draining."""
        self.heartbeat.turned(rests=True)
        if self.phase is Phase.LOADING:
            self._move(phase)
        self._mailbox.on_loop(self._settled.set)

    @property
    def tokenizer(self) -> ChatTokenizer:
        assert self._loaded is not None
        return self._loaded.tokenizer

    @property
    def num_active(self) -> int:
        return self.queue.num_active

    @property
    def is_short_of_memory(self) -> bool:
        """The next request to begin waits until there is room."""
        steps = self._steps
        return steps is not None and steps.room.is_short

    @property
    def trouble(self) -> Trouble | None:
        return self._lost or self.heartbeat.trouble(may_stall=self.phase is Phase.READY)

    def give_up(self, trouble: Trouble) -> None:
        """The thread is taken for lost: all who wait for it are told so, now and from now on."""
        self._lost = trouble
        self.failure = f"The engine has failed ({trouble}) and the server ends. Its log says why."
        self._mailbox.give_up(EngineFailed(self.failure, code=trouble))
        self._settled.set()

    # ── requests ─────────────────────────────────────────────────────────────────────────────

    async def tokenize(self, prompt: Prompt, agent: str | None) -> tuple[int, ...]:
        """Made in a worker thread; meanwhile the agent's memory is read.  Raises RequestError."""
        assert self._steps is not None
        self.queue.refuse_when_full()
        if agent is not None:
            self._mailbox.send(partial(self._steps.memory.expect, agent))
        return tuple(await asyncio.to_thread(self.tokenizer.tokens_of, prompt))

    async def stable_tokens(self, prompt: Prompt, tokens: Sequence[int]) -> int:
        """As of the tokenizer, where a model needs to know; else 0."""
        assert self._loaded is not None
        if not (self._loaded.proven.spec.states and isinstance(prompt, Conversation)):
            return 0
        return await asyncio.to_thread(self.tokenizer.stable_tokens, prompt, tokens)

    def bytes_of(self, token: int) -> bytes:
        assert self._grammars is not None
        return self._grammars.bytes_of(token)

    async def constraint(self, grammar: str, opening: tuple[int, ...] = ()) -> Constraint:
        """Compiled in a worker thread; `grammar` and `opening` as of model/grammar.py.  Raises
        RequestError."""
        if self.phase is not Phase.READY or self._grammars is None:
            raise refusal(self.phase, self.progress, self.failure)
        self.queue.refuse_when_full()
        return await asyncio.to_thread(self._grammars.constraint, grammar, opening)

    async def generate(
        self, request: GenerateRequest, constraint: Constraint | None = None
    ) -> AsyncGenerator[Event, None]:
        """Events of a request; closing the iterator cancels it.  Raises RequestError at once if it
        cannot be served; what fails later comes as the event Failed.  The constraint, which the
        answer keeps to, is this request's alone from now on."""
        if self.phase is not Phase.READY or self.model is None or self._steps is None:
            raise refusal(self.phase, self.progress, self.failure)
        limits.check(request, self.model)
        ended, began = False, time.monotonic()
        self.queue.enter()
        stream = self._mailbox.stream()
        try:
            self._mailbox.send(partial(self._steps.submit, request, stream, constraint))
            while not ended:
                event = await stream.get()
                ended = isinstance(event, Finished | Failed)
                yield event
        finally:
            self.queue.leave(time.monotonic() - began)
            if self.num_active == 0:
                self._idle.set()
            if not ended:
                self._mailbox.send(partial(self._steps.cancel, request.id))

    # ── the six stages, each called once, in this order ──────────────────────────────────────

    def stop_admission(self) -> None:
        """Stage 1.  Also ends a load under way at its next step, and who has not begun."""
        self._move(Phase.DRAINING)
        self._settled.set()
        self._draining_with = self.num_active
        if (steps := self._steps) and not self._lost:
            self._turned_away = self._mailbox.call(steps.end_waiting)

    async def drain(self, timeout_s: float, hurry: asyncio.Event) -> dict[str, int]:
        """Stage 2: let requests finish, at most `timeout_s` or until `hurry`; then end the rest."""
        if self.num_active:
            self._idle.clear()
            waits = [asyncio.create_task(event.wait()) for event in (self._idle, hurry)]
            await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
        steps = self._steps
        ended = await self._on_thread(steps.end_all) if steps and self.num_active else 0
        turned_away = await asyncio.wrap_future(self._turned_away) if self._turned_away else 0
        finished = self._draining_with - turned_away - ended
        return {"finished": finished, "turned_away": turned_away, "ended": ended}

    async def persist(self, timeout_s: float) -> dict[str, int]:
        """Stage 3: everything committed is on disk, the pool is empty, the store is closed."""
        deadline = time.monotonic() + timeout_s
        if not self._lost:  # else what it had told the writer is written all the same
            await self._on_thread(lambda: None)  # the last turn's commits are with the writer now
        dirty = self._store.pending_bytes
        flushed = await asyncio.to_thread(self._store.flush, timeout_s)
        closed = await asyncio.to_thread(self._store.close, deadline - time.monotonic() + 1.0)
        blocks, held = (0, 0) if self._lost else await self._on_thread(self._evict)
        if not (flushed and closed):
            raise TimeoutError(f"{self._store.pending_bytes} bytes were not on disk in time")
        return {"written_bytes": dirty, "evicted_blocks": blocks, "held_blocks": held}

    def _evict(self) -> tuple[int, int]:
        """Engine thread, after the store's last word."""
        blocks = len(self._pool)
        return blocks, self._steps.memory.clear() if self._steps else self._pool.clear()

    async def stop(self) -> dict[str, int]:
        """Stage 4: the step loop ends; the thread stays for the next two stages."""
        self.phase = Phase.STOPPED
        await self._on_thread(lambda: None)
        return {}

    async def unload(self) -> dict[str, int]:
        """Stage 5."""

        def drop() -> None:
            self._steps = None
            self._loaded = None
            self._grammars = None
            gc.unfreeze()
            gc.collect()

        await self._on_thread(drop)
        return {}

    async def release(self, timeout_s: float) -> dict[str, int]:
        """Stage 6: MLX gives its memory back, then the thread ends."""

        def free() -> dict[str, int]:
            self._leaving = True
            mx.synchronize()
            gc.collect()
            gc.collect()
            mx.clear_cache()
            figures = {
                "active_bytes": mx.get_active_memory(),
                "cache_bytes": mx.get_cache_memory(),
                "peak_bytes": mx.get_peak_memory(),
            }
            # A thread that ends with streams open can make the process abort when it exits.
            mx.clear_streams()
            return figures

        figures = await self._on_thread(free)
        await asyncio.to_thread(self._thread.join, timeout_s)
        if self._thread.is_alive():
            raise TimeoutError("the engine thread did not end")
        return figures

    async def _on_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._mailbox.call(function))


def _leave_alone_what_exists() -> None:
    """Modules and the model stay: looking through them for garbage, again and again while requests
    are served, would stop every thread for 50 to 100 ms."""
    gc.collect()
    gc.freeze()
