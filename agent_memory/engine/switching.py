"""Models come and go: the room a load needs, who must leave for it, and who comes back if it fails.

    prepare    files are found and read through, beside everything else
    switch     one at a time: others leave until there is room; it is loaded; if that fails they are
               loaded again

Who must leave is who was used longest ago: never the pinned, those in use last, and they are waited
for.  Requests for one that is leaving wait until the switch is done, so that it comes to pass.
Event loop.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

import structlog

from agent_memory.config import Config
from agent_memory.engine import budget
from agent_memory.engine.limits import ModelInfo
from agent_memory.engine.mailbox import Mailbox
from agent_memory.engine.phase import LoadCancelled
from agent_memory.engine.residents import Residents
from agent_memory.engine.room import RESERVE_NEW_TOKENS
from agent_memory.engine.served import Loaded, Served, draining
from agent_memory.errors import AgentMemoryError, ModelRefused, RequestError, Unavailable
from agent_memory.metrics import Metrics
from agent_memory.model import loader
from agent_memory.model.loader import Prepared, Progress

WAIT_S = 120.0
"""So long a load waits for those who use the models it replaces."""
QUIET_S = 0.01

T = TypeVar("T")
log = structlog.get_logger(__name__)


class Changes:
    """Wakes who waits for something, whenever anything has changed.  `error`: why nothing will."""

    def __init__(self) -> None:
        self.ending = False
        self.error: RequestError | None = None
        self._event = asyncio.Event()

    def tell(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    def end(self) -> None:
        self.ending = True
        self.tell()

    def refuse(self) -> None:
        """Raises RequestError if nothing will change."""
        if self.ending:
            raise draining()
        if self.error is not None:
            raise self.error

    async def until(self, true: Callable[[], bool]) -> None:
        """Raises RequestError when it will not be, and whenever the server ends."""
        while not true():
            self.refuse()
            await self._event.wait()
        if self.ending:
            raise draining()


class Switching:
    """`lock`: held for a switch."""

    def __init__(
        self,
        config: Config,
        residents: Residents,
        mailbox: Mailbox,
        metrics: Metrics,
        served: Mapping[str, Served],
        changes: Changes,
    ) -> None:
        self._config = config
        self._residents = residents
        self._mailbox = mailbox
        self._metrics = metrics
        self._served = served
        self._changes = changes
        self.lock = asyncio.Lock()

    # ── a load ───────────────────────────────────────────────────────────────────────────────

    def failed(self, served: Served, error: Exception) -> None:
        known = isinstance(error, AgentMemoryError)
        served.move(Loaded.FAILED, str(error) if known else f"{type(error).__name__}: {error}")
        self._metrics.model_failures.labels(served.name).inc()
        log.error("model_failed", model=served.name, reason=served.failure)

    async def bring_or_again(self, served: Served) -> None:
        """Once more where a file could not be read: a disk that comes back, a folder that is being
        written."""
        try:
            await self.bring(served)
        except OSError as error:
            log.warning("model_load_again", model=served.name, reason=str(error))
            await self.bring(served)

    async def bring(self, served: Served) -> None:
        """Raises whatever goes wrong; then everybody is where they were."""
        prepared = await self._prepare(served)
        async with self.lock:
            await self._switch_to(served, prepared)

    async def _prepare(self, served: Served) -> Prepared:
        digests = self._config.state_dir / "run" / "digests.json"
        return await _in_thread(partial(loader.prepare, served.source, served.tell, digests))

    async def _switch_to(self, served: Served, prepared: Prepared) -> None:
        """Under the lock.  If it fails, those who left for it come back."""
        left: list[Served] = []
        need = prepared.weights_bytes
        await self._on_thread(lambda: None)  # the ledger is open
        self._refuse_too_large(need, self._could_be_spare(served))
        served.tell(Progress("room"))
        try:
            await self._clear(served, left, lambda: self._residents.ledger.spare_bytes >= need)
            await self._place(served, prepared)
            await self._clear(served, left, lambda: served.most_tokens > RESERVE_NEW_TOKENS)
            if served.most_tokens <= RESERVE_NEW_TOKENS:
                raise self._too_little_left()
            self._ready(served)
        except Exception:
            if not self._changes.ending:
                await self._when(partial(self._residents.unload, served.name))
                await self._bring_back(left)
            raise
        finally:
            self.stay(left)

    async def _place(self, served: Served, prepared: Prepared) -> None:
        reserve = partial(self._residents.reserve, served.name, prepared.weights_bytes)
        try:
            async with asyncio.timeout(WAIT_S):
                await self._when(reserve)
        except TimeoutError as error:
            await self._when(partial(self._residents.unload, served.name))
            raise busy("What runs needs the memory it would take. Ask again.") from error
        loading = await self._on_thread(partial(self._residents.begin, prepared, served.tell))
        served.take(prepared, await asyncio.wrap_future(loading))

    def _ready(self, served: Served) -> None:
        served.move(Loaded.READY)
        served.last_used = time.monotonic()
        info, load_s = served.known, served.load_s
        self._metrics.model_loads.labels(served.name).inc()
        self._metrics.model_load_time.observe(load_s)
        log.info(
            "model_ready",
            model=served.name,
            context_length=info.context_length,
            load_s=load_s,
            self_test_difference=info.self_test_difference,
            most_tokens=served.most_tokens,
            memory=self._residents.ledger.figures(),
            **info.kv,
        )
        served.warnings = [_about_context(info)] if info.context_length != info.made_for else []
        for warning in served.warnings:
            log.warning("context_length_differs", model=served.name, warning=warning)

    # ── room for it ──────────────────────────────────────────────────────────────────────────

    def _may_leave(self, served: Served) -> list[Served]:
        """First who goes first: the pinned never, those in use last."""
        others = (
            other
            for other in self._served.values()
            if other is not served and not other.source.pinned
        )
        ready = [other for other in others if other.phase is Loaded.READY]
        return sorted(ready, key=lambda other: (other.users > 0, other.last_used))

    def _could_be_spare(self, served: Served) -> int:
        """Bytes, if all the others left that may."""
        ready = (other for other in self._served.values() if other.phase is Loaded.READY)
        pinned = [other for other in ready if other is not served and other.source.pinned]
        return self._residents.whole_bytes - sum(other.known.fixed_bytes for other in pinned)

    def most_alone(self, served: Served) -> int:
        """The longest sequence it could have, in tokens."""
        info = served.known
        return info.cost.most_tokens(self._could_be_spare(served) - info.fixed_bytes)

    def _refuse_too_large(self, need: int, could: int) -> None:
        if need > could:
            figures, could = budget.in_mb(self._residents.ledger), max(0, could)
            raise ModelRefused(
                f"Its weights take {need >> 20} MB, and at most {could >> 20} MB can be had for "
                f"them ({figures}). Give the server more --memory-bytes, or choose a smaller model."
            )

    def _too_little_left(self) -> ModelRefused:
        figures = budget.in_mb(self._residents.ledger)
        return ModelRefused(
            f"The model leaves no memory for what it is to remember: {figures}. Give the "
            "server more --memory-bytes, or choose a smaller model."
        )

    async def make_room(self, served: Served, num_tokens: int) -> None:
        """For a sequence that is too long beside the other models: those that nobody uses leave.

        Raises Unavailable at once where that is not enough: who waited here might wait for each
        other.
        """
        enough = served.most_tokens
        if not self.lock.locked():
            async with self.lock:
                left: list[Served] = []
                try:
                    while (enough := served.most_tokens) < num_tokens:
                        unused = [other for other in self._may_leave(served) if not other.users]
                        if not unused:
                            break
                        left.append(unused[0])
                        await self.leave(unused[0])
                finally:
                    self.stay(left)
        if enough < num_tokens:
            raise busy(
                f"Beside the other models there is memory for {enough} tokens now, and this needs "
                f"{num_tokens}. They are in use. Ask again."
            )

    async def _clear(self, served: Served, left: list[Served], enough: Callable[[], bool]) -> None:
        """Under the lock: one after another leaves, and is added to `left`."""
        while not enough() and (may_leave := self._may_leave(served)):
            left.append(may_leave[0])
            await self.leave(may_leave[0])

    async def leave(self, served: Served) -> None:
        served.leaving = True
        try:
            async with asyncio.timeout(WAIT_S):
                await self._changes.until(lambda: not served.users)
        except TimeoutError as error:
            raise busy(f"'{served.name}' is in use and was to make room. Ask again.") from error
        served.move(Loaded.UNLOADED)
        await self._drop(served)

    async def _drop(self, served: Served) -> None:
        await self._when(partial(self._residents.unload, served.name))
        self._metrics.model_unloads.labels(served.name).inc()
        log.info("model_unloaded", model=served.name, memory=self._residents.ledger.figures())

    def stay(self, left: list[Served]) -> None:
        """The switch is done: who waited may go on, and have them loaded again."""
        for served in left:
            served.leaving = False
        self._changes.tell()

    async def _bring_back(self, left: list[Served]) -> None:
        for served in left:
            if served.phase is not Loaded.UNLOADED:
                continue
            served.move(Loaded.LOADING)
            try:
                await self._place(served, await self._prepare(served))
                self._ready(served)
            except LoadCancelled:
                served.move(Loaded.UNLOADED)
            except Unavailable as error:  # the next request tries again
                log.warning("model_has_no_room", model=served.name, reason=error.message)
                served.move(Loaded.UNLOADED, error.message)
            except Exception as error:  # what it was to make room for failed already: that is told
                self.failed(served, error)

    async def _when(self, done: Callable[[], bool]) -> None:
        """Asked on the engine thread again and again: it takes a few steps, or a block's read."""
        while True:
            if await self._on_thread(done):
                return
            await asyncio.sleep(QUIET_S)

    async def _on_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._mailbox.call(function))


async def _in_thread(function: Callable[[], T]) -> T:
    """On a thread of its own, which the process need not wait for when it ends: it may be reading
    from a network that does not answer."""
    done: Future[T] = Future()
    done.set_running_or_notify_cancel()

    def run() -> None:
        try:
            done.set_result(function())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="prepare-model", daemon=True).start()
    return await asyncio.wrap_future(done)


def busy(why: str) -> Unavailable:
    return Unavailable(why, reason="busy", retry_after=10)


def _about_context(info: ModelInfo) -> str:
    ratio = info.context_length / info.made_for
    what = f"{info.context_length} tokens, {ratio:.0%} of the {info.made_for} it was made for"
    if ratio < 1:
        return (
            f"The context is set to {what}: longer prompts are refused though it could take them."
        )
    return f"The context is set to {what}: beyond these its answers may make no sense."
