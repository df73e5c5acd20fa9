"""The table of stages and its clock, with work of our own in them."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from agent_memory import failpoint
from agent_memory.server.shutdown import Shutdown, Work
from agent_memory.stages import (
    BUDGETS_S,
    HARD_DEADLINE_S,
    PROMISE_S,
    STAGES,
    Stage,
    supervisor_s,
)
from tests.source import ROOT


class Record:
    """Work that notes when it ran; some stages sleep, some raise."""

    def __init__(self, raising: set[Stage], slow: dict[Stage, float]) -> None:
        self.ran: list[Stage] = []
        self.seconds: dict[Stage, float] = {}
        self._raising = raising
        self._slow = slow

    def work(self) -> dict[Stage, Work]:
        return {stage: self._of(stage) for stage in STAGES}

    def _of(self, stage: Stage) -> Work:
        async def work(seconds: float) -> Mapping[str, object]:
            self.ran.append(stage)
            self.seconds[stage] = seconds
            await asyncio.sleep(self._slow.get(stage, 0))
            if stage in self._raising:
                raise RuntimeError("broken")
            return {"figure": 7}

        return work


def record(*raising: Stage, slow: dict[Stage, float] | None = None) -> Record:
    return Record(set(raising), slow or {})


def test_six_stages_fit_below_the_hard_deadline() -> None:
    assert len(STAGES) == 6
    assert sum(BUDGETS_S.values()) + 1.5 < HARD_DEADLINE_S < PROMISE_S == 15
    assert supervisor_s(25) == 60 and supervisor_s(0.5) > sum(BUDGETS_S.values()) + 0.5


async def test_each_stage_runs_once_and_in_order() -> None:
    work = record()
    six = Shutdown(1, work.work())
    await six.through(Stage.DRAIN)
    assert work.ran == [Stage.STOP_ADMISSION, Stage.DRAIN]
    await asyncio.gather(*(six.through(STAGES[-1]) for _ in range(5)))
    await six.through(Stage.DRAIN)
    assert work.ran == list(STAGES)
    assert six.report() == 0 and six.unfinished() == []


@pytest.mark.requirement("L-28")
@pytest.mark.parametrize("stage", STAGES)
async def test_a_stage_that_raises_is_named_and_the_others_run(stage: Stage) -> None:
    work = record(stage)
    six = Shutdown(1, work.work())
    await six.through(STAGES[-1])
    assert work.ran == list(STAGES)
    assert six.report() == 70 and six.unfinished() == [stage]


@pytest.mark.requirement("L-28")
async def test_a_stage_that_overruns_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUDGETS_S, Stage.STOP_ADMISSION, 0.05)
    monkeypatch.setitem(BUDGETS_S, Stage.DRAIN, 0.05)
    work = record(slow={Stage.STOP_ADMISSION: 60, Stage.DRAIN: 60})
    six = Shutdown(0.1, work.work())
    began = time.monotonic()
    await six.through(STAGES[-1])
    assert time.monotonic() - began < 10  # of 60 each
    assert work.ran == list(STAGES)
    assert six.unfinished() == [Stage.STOP_ADMISSION, Stage.DRAIN]


async def test_a_stage_gets_what_those_before_it_left_over() -> None:
    work = record(slow={Stage.DRAIN: 0.2})
    await Shutdown(30, work.work()).through(STAGES[-1])
    assert work.seconds[Stage.STOP_ADMISSION] == pytest.approx(0.5, abs=0.1)
    assert work.seconds[Stage.DRAIN] == pytest.approx(30 + 0.5 + 1.5, abs=0.1)
    assert work.seconds[Stage.PERSIST] == pytest.approx(32 - 0.2 + 5, abs=0.1)
    assert work.seconds[Stage.RELEASE_MEMORY] == pytest.approx(42 - 0.2, abs=0.1)


@pytest.mark.requirement("L-29")
async def test_cancelling_who_waits_does_not_stop_the_stages() -> None:
    work = record(slow={Stage.PERSIST: 0.2})
    six = Shutdown(1, work.work())
    waiting = asyncio.create_task(six.through(STAGES[-1]))
    await asyncio.sleep(0.1)
    assert six.unfinished() == [Stage.PERSIST]
    waiting.cancel()
    await asyncio.wait({waiting})
    assert waiting.cancelled()
    await six.through(STAGES[-1])
    assert work.ran == list(STAGES) and six.report() == 0


LAST_RESORT = """
import ctypes, sys, time
from pathlib import Path
from agent_memory.server import logs, shutdown
from agent_memory.server.faults import FaultLog
logs.configure("json")
shutdown.leave_within(0.2, lambda: ["persist"], FaultLog(Path(sys.argv[1])))
"""


def last_resort(folder: Path, then: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", LAST_RESORT + then, folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )


@pytest.mark.requirement("L-30")
def test_the_last_resort_ends_a_process_that_hangs(tmp_path: Path) -> None:
    run = last_resort(tmp_path, "time.sleep(60)")
    assert run.returncode == 70
    event = json.loads(run.stderr.splitlines()[0])
    assert (event["event"], event["failed"]) == ("server_shutdown_incomplete", ["persist"])
    assert "most recent call first" in (tmp_path / "fault.log").read_text()


def test_even_one_whose_python_stands_still(tmp_path: Path) -> None:
    """Something native holds the interpreter: no thread of Python's can run any more."""
    began = time.monotonic()
    run = last_resort(tmp_path, "ctypes.PyDLL(None).sleep(60)")
    assert run.returncode == 1 and time.monotonic() - began < 20
    assert "most recent call first" in (tmp_path / "fault.log").read_text()


async def test_a_failpoint_stands_in_for_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(failpoint.VARIABLE, "shutdown.persist,other")
    work = record()
    six = Shutdown(1, work.work())
    await six.through(STAGES[-1])
    assert work.ran == [stage for stage in STAGES if stage is not Stage.PERSIST]
    assert six.unfinished() == [Stage.PERSIST]
