"""The engine as the event loop sees it: a thread, its life, and the models on it.

The thread lives from `start` to `release`: it loads models, steps while there is work, and stays
for unloading and freeing, because MLX arrays must die where they were made.  Methods are for the
event loop; what starts with an underscore and says so runs on the engine thread.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import mlx.core as mx
import structlog

from agent_memory.config import Config
from agent_memory.engine.agent_verbs import AgentVerbs
from agent_memory.engine.heartbeat import Heartbeat, Trouble
from agent_memory.engine.limits import Queue
from agent_memory.engine.mailbox import Mailbox
from agent_memory.engine.models import Models
from agent_memory.engine.phase import Note, Phase
from agent_memory.engine.residents import Residents
from agent_memory.engine.served import Loaded
from agent_memory.engine.transfer import Model, Transfer
from agent_memory.errors import EngineFailed
from agent_memory.failpoint import failpoint
from agent_memory.metrics import Metrics
from agent_memory.model import footprint
from agent_memory.store.block_store import BlockStore

T = TypeVar("T")
log = structlog.get_logger(__name__)

OF_DEFAULT = {
    Loaded.UNLOADED: Phase.READY,  # the next request loads it
    Loaded.LOADING: Phase.LOADING,
    Loaded.READY: Phase.READY,
    Loaded.FAILED: Phase.FAILED,
}


class Engine:
    """`note`: as the type says, from the event loop and from the engine thread."""

    def __init__(
        self,
        config: Config,
        store: BlockStore,
        metrics: Metrics,
        note: Note = lambda phase, step: None,
    ) -> None:
        self.heartbeat = Heartbeat()
        self._note = note
        self._lost: Trouble | None = None  # the thread was given up
        self._store = store
        self._mailbox = Mailbox()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._residents = Residents(config, store, metrics, self._mailbox)
        self._idle = asyncio.Event()  # the last active request has ended
        self.queue = Queue(config.max_requests, len(config.api_keys.tenants))
        self.queue.on_empty = self._idle.set
        self.models = Models(
            *(config, self._residents, self._mailbox, self.queue, metrics),
            lambda step: note(self.phase, step),
        )
        self._own_phase: Phase | None = Phase.STARTING
        self._draining_with = 0  # requests that were here when admission stopped
        self._turned_away: Future[int] | None = None  # of these, how many had not begun
        self._leaving = False
        self.agents = AgentVerbs(store, self._residents, self._mailbox, self.models)
        self.transfer = Transfer(
            *(store, self._residents.pool, self._mailbox),
            lambda fingerprint: Model.of(self.models.facts(fingerprint)),
        )

    # ── life ─────────────────────────────────────────────────────────────────────────────────

    @property
    def phase(self) -> Phase:
        """Between start and end what the default model's is."""
        return self._own_phase or OF_DEFAULT[self.models.default.phase]

    @property
    def num_active(self) -> int:
        return self.queue.num_active

    def start(self, loop: asyncio.AbstractEventLoop, *, held: bool = False) -> None:
        """The thread, and unless `held` the default model."""
        self._mailbox.connect(loop)
        self._thread.start()
        if held:
            self.models.hold()
            self._move(Phase.HELD)
        else:
            self.load()

    def load(self) -> None:
        assert self.phase in (Phase.STARTING, Phase.HELD)
        self._own_phase = None
        self.models.start()

    def _move(self, phase: Phase) -> None:
        self._own_phase = phase
        self._note(phase, "")

    def _run(self) -> None:
        """The engine thread."""
        try:
            self._residents.open()
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
            self._residents.fail_all()

    def _turn(self) -> None:
        """Engine thread.  When the last request has ended every owner of state is checked."""
        residents, busy, idle = self._residents, False, True
        if self._own_phase is not Phase.STOPPED:
            busy, idle = residents.has_work, residents.is_idle
            residents.check_if_idle()
        self.heartbeat.turned(rests=idle and not busy)
        command = self._mailbox.take(wait=not busy)
        self.heartbeat.woken()
        while command is not None:
            command()
            residents.something_changed()
            command = self._mailbox.take(wait=False)
        if busy and residents.is_stepping:
            failpoint("engine.turn")
            residents.turn()
            self.heartbeat.stepped()
        elif busy:
            residents.turn()

    @property
    def is_short_of_memory(self) -> bool:
        """The next request to begin waits until there is room."""
        return any(loop.room.is_short for loop in list(self._residents.loops.values()))

    @property
    def trouble(self) -> Trouble | None:
        """A load has steps of their own length."""
        may_stall = self.phase is Phase.READY and not self._residents.is_loading
        return self._lost or self.heartbeat.trouble(may_stall=may_stall)

    def give_up(self, trouble: Trouble) -> None:
        """The thread is taken for lost: all who wait for it are told so, now and from now on."""
        self._lost = trouble
        said = f"The engine has failed ({trouble}) and the server ends. Its log says why."
        error = EngineFailed(said, code=trouble)
        self._mailbox.give_up(error)
        self.models.give_up(error)

    # ── the six stages, each called once, in this order ──────────────────────────────────────

    def stop_admission(self) -> None:
        """Stage 1.  Also ends a load under way at its next step, and who has not begun."""
        self._move(Phase.DRAINING)
        self.models.end()
        self._draining_with = self.num_active
        if not self._lost:
            self._turned_away = self._mailbox.call(self._residents.end_waiting)

    async def drain(self, timeout_s: float, hurry: asyncio.Event) -> dict[str, int]:
        """Stage 2: let requests finish, at most `timeout_s` or until `hurry`; then end the rest."""
        if self.num_active:
            self._idle.clear()
            waits = [asyncio.create_task(event.wait()) for event in (self._idle, hurry)]
            await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
        ended = await self._on_thread(self._residents.end_all) if self.num_active else 0
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
        evict = self._residents.evict  # after the store's last word
        blocks, held = (0, 0) if self._lost else await self._on_thread(evict)
        if not (flushed and closed):
            raise TimeoutError(f"{self._store.pending_bytes} bytes were not on disk in time")
        return {"written_bytes": dirty, "evicted_blocks": blocks, "held_blocks": held}

    async def stop(self) -> dict[str, int]:
        """Stage 4: the step loop ends; the thread stays for the next two stages."""
        self._own_phase = Phase.STOPPED
        await self._on_thread(lambda: None)
        return {}

    async def unload(self) -> dict[str, int]:
        """Stage 5."""
        await self._on_thread(self._residents.drop_all)
        return {}

    async def release(self, timeout_s: float) -> dict[str, int]:
        """Stage 6: MLX gives its memory back, then the thread ends."""

        def free() -> dict[str, int]:
            self._leaving = True
            figures = footprint.give_back()
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
