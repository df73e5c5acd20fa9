"""The configured models, and who uses them.

    find a model ─► use it ─► it is loaded if need be ─► others make room ─► it is used

However many ask for a model that is not there, it is loaded once.  Requests that are under way end
on their model.  What agents have in mind stays in pool and store under the model's fingerprint, and
is found again when it comes back.  Event loop.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager

import structlog

from agent_memory.block import BlockHash
from agent_memory.config import Config
from agent_memory.engine.limits import ModelInfo, Queue
from agent_memory.engine.mailbox import Mailbox
from agent_memory.engine.phase import LoadCancelled, Phase, refusal
from agent_memory.engine.residents import Residents
from agent_memory.engine.served import Loaded, Served
from agent_memory.engine.switching import Changes, Switching, busy
from agent_memory.errors import Conflict, NotFound, RequestError, Unavailable
from agent_memory.metrics import Metrics

LOADING_S = 120.0
"""So long a request waits for its model."""
TELL_S = 5.0

log = structlog.get_logger(__name__)


class Models:
    def __init__(
        self,
        config: Config,
        residents: Residents,
        mailbox: Mailbox,
        queue: Queue,
        metrics: Metrics,
        note: Callable[[str], object],
    ) -> None:
        self._residents = residents
        self._mailbox = mailbox
        self._idle_s = config.model_idle_timeout
        self._served = {
            source.name: Served(source, residents, mailbox, queue, note) for source in config.models
        }
        self.default = next(iter(self))
        self._changes = Changes()
        self._switching = Switching(
            config, residents, mailbox, metrics, self._served, self._changes
        )
        for served in self:
            served.make_room = self._switching.make_room
            served.most_alone = self._switching.most_alone
        self._tasks = set[asyncio.Task[None]]()

    def __iter__(self) -> Iterator[Served]:
        yield from self._served.values()

    # ── life ─────────────────────────────────────────────────────────────────────────────────

    def hold(self) -> None:
        """Nothing is loaded before `start`, whoever asks."""
        self._changes.error = refusal(Phase.HELD, {}, None)

    def give_up(self, error: RequestError) -> None:
        """Nothing will be loaded any more."""
        self._changes.error = error
        self._changes.tell()

    def start(self) -> None:
        self._changes.error = None
        self._begin(self.default)
        if self._idle_s is not None:
            self._spawn(self._unload_idle(self._idle_s))

    def end(self) -> None:
        """Nothing is loaded any more, a load under way ends at its next step."""
        for served in self:
            served.ending = True
        self._mailbox.send(self._residents.end_load)
        for task in self._tasks:
            task.cancel()
        self._changes.end()

    # ── who asks ─────────────────────────────────────────────────────────────────────────────

    def find(self, name: str | None) -> Served:
        """None: the default.  Raises NotFound."""
        if name is None:
            return self.default
        if name not in self._served:
            names = ", ".join(f"'{known}'" for known in self._served)
            raise NotFound(
                f"There is no model '{name}' here. There is {names}; a request without 'model' "
                f"takes '{self.default.name}'.",
                param="model",
                code="model_not_found",
            )
        return self._served[name]

    def of_fingerprint(self, fingerprint: BlockHash) -> Served | None:
        """The model that computes such blocks, once it was loaded."""
        own = (s for s in self if s.info and s.info.spec.fingerprint == fingerprint)
        return next(own, None)

    def facts(self, fingerprint: BlockHash | None) -> ModelInfo:
        """Of the model that computes such blocks, else of the default, in memory or not.  Any
        thread.  Raises Unavailable when neither was loaded yet."""
        own = self.of_fingerprint(fingerprint) if fingerprint else None
        info = (own or self.default).info
        if info is None:
            raise Unavailable(
                f"The model '{self.default.name}' is not loaded. Ask again when /readyz says so.",
                reason="loading",
                retry_after=10,
            )
        return info

    @asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[Served]:
        """It is loaded, and stays so.  Raises NotFound; Unavailable with the reason."""
        served = self.find(name)
        counted = False
        try:
            try:
                async with asyncio.timeout(LOADING_S):
                    await self._changes.until(lambda: not served.leaving)
                    served.users += 1
                    counted = True
                    await self._loaded(served)
            except TimeoutError as error:
                raise _loading(served) from error
            yield served
        finally:
            served.users -= counted
            served.last_used = time.monotonic()
            self._changes.tell()

    async def _loaded(self, served: Served) -> None:
        if served.phase is Loaded.UNLOADED:
            self._changes.refuse()
            self._begin(served)
        await self._changes.until(lambda: served.phase is not Loaded.LOADING)
        if served.phase is Loaded.FAILED:
            raise Unavailable(
                f"The model '{served.name}' could not be loaded: {served.failure}",
                reason="failed",
                retry_after=60,
            )
        if served.phase is Loaded.UNLOADED:
            raise busy(served.failure or "It was unloaded. Ask again.")

    async def load(self, name: str) -> Served:
        """Raises NotFound; Conflict with the reason when it fails."""
        served = self.find(name)
        self._changes.refuse()
        if served.phase in (Loaded.UNLOADED, Loaded.FAILED):
            self._begin(served)
        await self._changes.until(lambda: served.phase is not Loaded.LOADING)
        if served.phase is Loaded.FAILED:
            raise Conflict(
                f"The model '{name}' could not be loaded: {served.failure}", code="model_failed"
            )
        if served.phase is Loaded.UNLOADED and served.failure:
            raise busy(served.failure)
        return served

    async def unload(self, name: str) -> Served:
        """When nothing runs on it any more.  Raises NotFound, Unavailable."""
        served = self.find(name)
        await self._changes.until(lambda: served.phase is not Loaded.LOADING)
        async with self._switching.lock:
            try:
                if served.phase is Loaded.READY:
                    await self._switching.leave(served)
                elif served.phase is Loaded.FAILED:
                    served.move(Loaded.UNLOADED)
            finally:
                self._switching.stay([served])
        return served

    # ── a load ───────────────────────────────────────────────────────────────────────────────

    def _begin(self, served: Served) -> None:
        """From here on it is loading, whoever else asks for it."""
        served.move(Loaded.LOADING)
        self._spawn(self._load(served))

    async def _load(self, served: Served) -> None:
        telling = asyncio.create_task(_tell_progress(served))
        try:
            await self._switching.bring_or_again(served)
        except asyncio.CancelledError:
            served.move(Loaded.UNLOADED)
            raise
        except LoadCancelled:
            served.move(Loaded.UNLOADED)
        except Unavailable as error:
            log.warning("model_has_no_room", model=served.name, reason=error.message)
            served.move(Loaded.UNLOADED, error.message)
        except Exception as error:  # whatever it is, the others go on
            self._switching.failed(served, error)
        finally:
            telling.cancel()
            self._changes.tell()

    async def _unload_idle(self, after_s: float) -> None:
        while True:
            await asyncio.sleep(min(after_s / 4, TELL_S))
            for served in self:
                if self._is_idle(served, after_s):
                    async with self._switching.lock:
                        try:
                            if self._is_idle(served, after_s):
                                await self._switching.leave(served)
                        finally:
                            self._switching.stay([served])

    def _is_idle(self, served: Served, after_s: float) -> bool:
        at_rest = served.phase is Loaded.READY and not served.users and not served.source.pinned
        return at_rest and time.monotonic() - served.last_used >= after_s

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _tell_progress(served: Served) -> None:
    while True:
        await asyncio.sleep(TELL_S)
        served.log_progress()


def _loading(served: Served) -> Unavailable:
    return Unavailable(
        f"The model '{served.name}' is still loading ({served.progress}). Try again shortly.",
        reason="loading",
        retry_after=10,
    )
