"""F11, F12: told to stop at any moment, and killed in every stage of stopping."""

import shutil
import signal
import time
from functools import partial
from pathlib import Path
from random import Random

import pytest

from agent_memory.metrics import Metrics
from agent_memory.stages import STAGES, Stage
from agent_memory.store.block_store import BlockStore
from agent_memory.store.state_dir import StateDir
from tests.process import Server
from tests.suites import NewSuite, sized

SEED = 110
LONGEST_S = 1.5
TEXT = "Remember these facts:\n- the code for orchid is 7319"
DRAIN = ("--drain-timeout", "1")
PROMISE_S = 1 + 15


def tokens_on_disk(folder: Path, agent: str) -> int:
    """Of its newest head, which must be there to the last block; nothing unfinished is left."""
    state_dir = StateDir.open(folder)
    try:
        store = BlockStore.open(state_dir, Metrics())
        try:
            assert not list(state_dir.tmp.iterdir())
            owner = store.agents.get(agent)
            chain = owner.heads[0].chain if owner else ()
            assert all(store.find(block.hash) for block in chain)
            return sum(block.num_tokens for block in chain)
        finally:
            assert store.close(5)
    finally:
        state_dir.close()


@pytest.mark.requirement("F-11")
@sized(short=3, full=200)
def test_told_to_stop_at_any_moment(num_cases: int, tmp_path: Path, suite: NewSuite) -> None:
    """While it loads, while it computes, and while it saves."""
    rng = Random(SEED)
    with suite("F11 stopped at any moment", num_cases, SEED) as cases:
        for n in range(num_cases):
            wait_s = rng.random() * LONGEST_S
            with cases.case((n, wait_s)):
                with Server(tmp_path, *DRAIN) as server:
                    if n % 2:
                        server.wait_ready().ask(f"{n} {TEXT}", "ann", max_tokens=4)
                    time.sleep(wait_s)
                    server.signal()
                    assert server.wait(PROMISE_S) == 0, server.log()
                    assert "Traceback" not in server.log()
                assert tokens_on_disk(server.state_dir, "ann") > 0 or n == 0


def is_blocked_after(server: Server, stages: list[str]) -> bool:
    told = [line["stage"] for line in server.events("shutdown_stage")]
    return bool(server.events("signal")) and told == stages


@pytest.mark.requirement("F-12")
@pytest.mark.parametrize(
    ("stage", "num_cases"),
    [
        pytest.param(Stage.PERSIST, 1, id="short"),
        *(
            pytest.param(stage, 20, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])
            for stage in STAGES
        ),
    ],
)
def test_killed_in_a_stage(stage: Stage, num_cases: int, tmp_path: Path, suite: NewSuite) -> None:
    """What had been on disk is there, and the next server goes on from it."""
    before = [str(earlier) for earlier in STAGES[: STAGES.index(stage)]]
    with suite(f"F12 killed in stage {stage}", num_cases, None) as cases:
        for n in range(num_cases):
            with cases.case(n):
                with Server(tmp_path, *DRAIN, failpoint=f"shutdown.{stage}:block") as server:
                    used = server.wait_ready().ask(TEXT, "ann").json()["usage"]["total_tokens"]
                    server.wait_on_disk("ann", used)
                    server.signal()
                    server.wait_until(partial(is_blocked_after, server, before))
                    time.sleep(0.02 * n)
                    server.signal(signal.SIGKILL)
                    assert server.wait(10) == -signal.SIGKILL
                assert tokens_on_disk(server.state_dir, "ann") == used
                with Server(tmp_path) as again:
                    usage = again.wait_ready().ask(TEXT, "ann").json()["usage"]
                    cached = usage["prompt_tokens_details"]["cached_tokens"]
                    assert cached == usage["prompt_tokens"] - 1
                shutil.rmtree(server.state_dir)
