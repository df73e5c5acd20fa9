"""The six stages of shutdown one after another, the clock over them, and the last resort.

Knows results and what to say of them; order and budgets are a table in stages.py.  What a stage
does is its owner's.  Event loop, but for the last resort, which has a thread of its own.

A stage has its own seconds and those that the stages before it left over.  One that raises or
overruns is named, and the next begins.  Nothing is begun twice.
"""

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable, Mapping

import structlog

from agent_memory.failpoint import failpoint
from agent_memory.server.faults import FaultLog
from agent_memory.stages import BUDGETS_S, EXIT_CLEAN, EXIT_INCOMPLETE, STAGES, Stage

Work = Callable[[float], Awaitable[Mapping[str, object]]]
"""A stage at work: takes its seconds, returns its figures."""

Begun = Callable[[Stage, float], object]
"""Told of a stage that begins, and of its seconds."""

NATIVE_S = 0.4
"""So much later than the last resort comes one that needs no Python."""

log = structlog.get_logger(__name__)


class Shutdown:
    def __init__(
        self,
        drain_timeout_s: float,
        work: Mapping[Stage, Work],
        begun: Begun = lambda stage, seconds: None,
    ) -> None:
        assert tuple(work) == STAGES
        self._drain_timeout_s = drain_timeout_s
        self._work = work
        self._begun = begun
        self._turn = asyncio.Lock()
        self._results: dict[str, object] = {}
        self._failed: list[str] = []
        self._current: Stage | None = None
        self._began = self._deadline = 0.0

    async def through(self, last: Stage) -> None:
        """Run what has not run up to `last`.  It goes on though whoever waits be cancelled."""
        await asyncio.shield(asyncio.create_task(self._through(last)))

    async def _through(self, last: Stage) -> None:
        async with self._turn:
            if not self._began:
                self._began = self._deadline = time.monotonic()
            for stage in STAGES[len(self._results) : STAGES.index(last) + 1]:
                await self._run(stage)

    async def _run(self, stage: Stage) -> None:
        began, budget_s = time.monotonic(), self._budget_s(stage)
        figures: Mapping[str, object] = {}
        self._current = stage
        self._begun(stage, budget_s)
        try:
            failpoint(f"shutdown.{stage}")
            async with asyncio.timeout(budget_s):
                figures = await self._work[stage](budget_s)
        except Exception as error:
            self._failed.append(stage)
            log.error("shutdown_stage_failed", stage=str(stage), exc_info=error)
        self._current = None
        result = {"ms": _ms_since(began), "budget_ms": round(1000 * budget_s), **figures}
        self._results[str(stage)] = result
        log.info("shutdown_stage", stage=str(stage), ok=stage not in self._failed, **result)

    def _budget_s(self, stage: Stage) -> float:
        own_s = BUDGETS_S[stage]
        if stage is Stage.DRAIN:
            own_s += self._drain_timeout_s
        self._deadline += own_s
        return max(own_s, self._deadline - time.monotonic())

    def count_as_failed(self, what: str) -> None:
        """Something besides the stages went wrong."""
        self._failed.append(what)

    def report(self) -> int:
        """Say how it went; the exit status."""
        assert len(self._results) == len(STAGES)
        figures = {"total_ms": _ms_since(self._began), "stages": self._results}
        if self._failed:
            log.error(
                "server_shutdown_incomplete", failed=self._failed, exit=EXIT_INCOMPLETE, **figures
            )
            return EXIT_INCOMPLETE
        log.info("server_shutdown_complete", exit=EXIT_CLEAN, **figures)
        return EXIT_CLEAN

    def unfinished(self) -> list[str]:
        """What has failed and what is under way.  Any thread."""
        return [*self._failed, *filter(None, [self._current])]


def leave_within(seconds: float, unfinished: Callable[[], list[str]], faults: FaultLog) -> None:
    """The last resort: ends the process whatever the event loop does.  Never called off."""

    def leave() -> None:
        time.sleep(seconds)
        stages = unfinished() or ["exit"]
        log.error("server_shutdown_incomplete", failed=stages, exit=EXIT_INCOMPLETE)
        faults.write_stacks("hard deadline")
        os._exit(EXIT_INCOMPLETE)

    faults.exit_after(seconds + NATIVE_S)
    threading.Thread(target=leave, name="hard-deadline", daemon=True).start()


def _ms_since(began: float) -> int:
    return round(1000 * (time.monotonic() - began))
