"""Looks once a second whether the engine gets on, and ends the process when it does not.

An engine that died, or that stood still for twice as long as a turn may take, is given up: who
waits for it is told, what is remembered is written, and the process ends with a status for which a
supervisor starts another.  It is not started again in this process: what it left of MLX's streams
and of half-written memory nobody can vouch for.  Event loop.
"""

import asyncio
from collections.abc import Callable

import structlog

from agent_memory.engine.engine import Engine
from agent_memory.engine.heartbeat import Trouble
from agent_memory.server.faults import FaultLog

LOOK_S = 1.0

log = structlog.get_logger(__name__)


class Watch:
    """`on_lost`: called once, when the engine was given up.  `each_time`: at every look."""

    def __init__(
        self,
        engine: Engine,
        faults: FaultLog,
        on_lost: Callable[[Trouble], object],
        each_time: Callable[[], object],
    ) -> None:
        self._engine = engine
        self._faults = faults
        self._on_lost = on_lost
        self._each_time = each_time
        self._trouble: Trouble | None = None
        self._stood_s = 0.0
        self._given_up = False

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            self._each_time()
            if not self._given_up:
                self._look()

    def _look(self) -> None:
        """How long it stands is counted in looks: a process that was frozen does not give up on
        what it has not seen move."""
        trouble = self._engine.trouble
        if trouble is not self._trouble:
            self._tell(trouble)
            self._trouble, self._stood_s = trouble, 0.0
        if trouble is Trouble.STALLED:
            self._stood_s += LOOK_S
        if trouble is Trouble.DEAD or self._stood_s > self._engine.heartbeat.limit_s:
            self._give_up(self._trouble)

    def _tell(self, trouble: Trouble | None) -> None:
        heartbeat = self._engine.heartbeat
        log.log(
            30 if trouble is None else 40,
            "engine_state",
            was=self._trouble or "ok",
            now=trouble or "ok",
            last_turn_age_s=round(heartbeat.turn_age_s, 1),
            stalled_after_s=round(heartbeat.limit_s, 1),
            stacks=str(self._faults.path),
        )
        if trouble is not None:
            self._faults.write_stacks(trouble)

    def _give_up(self, trouble: Trouble | None) -> None:
        assert trouble is not None
        self._given_up = True
        log.error("engine_given_up", reason=trouble, requests=self._engine.num_active)
        self._engine.give_up(trouble)
        self._on_lost(trouble)
