"""What the process owns, from the open store to the freed memory.

`Lifespan` builds metrics, store, engine and app, and gives each shutdown stage its work.  Starlette
enters it when the server starts and leaves it when all connections have ended.  That may never
come, so whoever runs the server calls `close` as well.  Event loop.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

import structlog
from starlette.applications import Starlette

from agent_memory.config import Config
from agent_memory.engine.engine import Engine
from agent_memory.engine.heartbeat import Trouble
from agent_memory.engine.phase import HELD, Phase
from agent_memory.metrics import Metrics
from agent_memory.server import app
from agent_memory.server.access import Names
from agent_memory.server.connections import Connections, most_that_fit
from agent_memory.server.gate import Gate
from agent_memory.server.recorder import Recorder
from agent_memory.server.shutdown import Shutdown
from agent_memory.server.space import AllDocuments, Space, open_documents
from agent_memory.server.upload import Place
from agent_memory.server.watch import Watch
from agent_memory.stages import STAGES, Stage
from agent_memory.store.block_store import BlockStore
from agent_memory.store.limits import Limits
from agent_memory.store.state_dir import StateDir
from agent_memory.tenants import outside, tenant_of

ANSWERS_S = 1.0  # for what was generated to reach its clients
STORE_S = 1.0

log = structlog.get_logger(__name__)


class Lifespan:
    """`hurry`: set, running requests get no more time.  `leaving`: set when Starlette leaves."""

    def __init__(
        self,
        config: Config,
        state_dir: StateDir,
        store: BlockStore,
        documents: AllDocuments,
        metrics: Metrics,
        recorder: Recorder,
        hurry: asyncio.Event,
    ) -> None:
        most = most_that_fit(config.max_connections)
        self.connections = Connections(config.send_timeout, most)
        self._hurry = hurry
        self.leaving = asyncio.Event()
        self._store = store
        self._metrics = metrics
        self._recorder = recorder
        self._engine = Engine(config, store, metrics, recorder.phase)
        self._engine.agents.on_removed.append(self._forget_agent)
        self._drain_timeout_s = config.drain_timeout
        self._shutdown = Shutdown(
            config.drain_timeout,
            {
                Stage.STOP_ADMISSION: self._stop_admission,
                Stage.DRAIN: self._drain,
                Stage.PERSIST: self._engine.persist,
                Stage.STOP_ENGINE: lambda seconds: self._engine.stop(),
                Stage.UNLOAD_MODEL: lambda seconds: self._engine.unload(),
                Stage.RELEASE_MEMORY: self._engine.release,
            },
            recorder.stage,
        )
        routes = app.build(self._entered)
        self._spaces = {
            tenant: Space(tenant, config, own, routes, self._state, store.keeps_floor)
            for tenant, own in documents.items()
        }
        place = Place(state_dir.tmp, store.keeps_floor)
        names = Names(None if config.uds else config.host)
        asks = self._is_draining, self._own_state
        self.gate = Gate(routes, names, config.api_keys, place, *asks)

    @classmethod
    async def open(
        cls, config: Config, state_dir: StateDir, recorder: Recorder, hurry: asyncio.Event
    ) -> "Lifespan":
        """Open the store and begin to load the model, unless that went wrong too often.  Raises
        StartError."""
        metrics = Metrics()
        documents = await asyncio.to_thread(open_documents, state_dir, config)
        limits = Limits(
            config.disk_bytes,
            config.min_free_bytes,
            config.max_age_days,
            config.daily_write_bytes,
        )
        store = await asyncio.to_thread(BlockStore.open, state_dir, metrics, limits)
        lifespan = cls(config, state_dir, store, documents, metrics, recorder, hurry)
        store.scrub_while(lambda: lifespan._engine.num_active == 0)
        held_s = recorder.starts.held_for_s()
        metrics.unclean_starts.set(recorder.starts.num_unclean())
        lifespan._engine.start(asyncio.get_running_loop(), held=held_s > 0)
        if held_s:
            log.error("model_not_loaded", reason=HELD, tries_again_in_s=round(held_s))
        return lifespan

    async def watch(self, stop: asyncio.Event) -> None:
        """For the whole life.  An engine that is lost sets `stop`."""

        def lost(trouble: Trouble) -> None:
            self._shutdown.count_as_failed(trouble)
            stop.set()

        await Watch(self._engine, self._recorder.faults, lost, self._each_second).run()

    def _each_second(self) -> None:
        self._recorder.alive()
        if self._engine.phase is Phase.HELD and not self._recorder.starts.held_for_s():
            self._engine.load()

    @asynccontextmanager
    async def _entered(self, app: Starlette) -> AsyncIterator[Mapping[str, object]]:
        for space in self._spaces.values():
            await space.batches.start()
        try:
            yield self._state()
        finally:
            self.leaving.set()
            await self.close()

    def _state(self) -> Mapping[str, object]:
        """What routes find in `request.state`, whoever asks."""
        return {
            "engine": self._engine,
            "metrics": self._metrics,
            "connections": self.connections,
        }

    def _own_state(self, tenant: str | None) -> Mapping[str, object]:
        return self._spaces[tenant].state()

    def _forget_agent(self, agent_id: str) -> None:
        self._spaces[tenant_of(agent_id)].explanations.forget_agent(outside(agent_id))

    async def drain(self) -> None:
        """Stages 1 and 2, while connections are still served."""
        await self._shutdown.through(Stage.DRAIN)

    async def close(self) -> None:
        """The stages that are left.  Again does no harm."""
        await self._shutdown.through(STAGES[-1])
        # Stage 3 did this, unless it failed, and an open store would keep the process.
        await asyncio.to_thread(self._store.close, STORE_S)

    def report(self) -> int:
        return self._shutdown.report()

    def unfinished(self) -> list[str]:
        return self._shutdown.unfinished()

    def count_as_failed(self, what: str) -> None:
        self._shutdown.count_as_failed(what)

    def _is_draining(self) -> bool:
        return self._engine.phase in (Phase.DRAINING, Phase.STOPPED)

    async def _stop_admission(self, seconds: float) -> Mapping[str, object]:
        await asyncio.gather(*(space.batches.stop() for space in self._spaces.values()))
        self._engine.stop_admission()
        return {"active": self._engine.num_active, "connections": len(self.connections)}

    async def _drain(self, seconds: float) -> Mapping[str, object]:
        figures = await self._engine.drain(self._drain_timeout_s, self._hurry)
        with suppress(TimeoutError):
            async with asyncio.timeout(ANSWERS_S):
                await self.gate.empty.wait()
        return {**figures, "unsent": self.gate.num_inside}
