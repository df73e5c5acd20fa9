"""F1, F18: SIGKILL, whatever the process was doing."""

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

import pytest

from agent_memory.block import BlockHash
from agent_memory.store.state_dir import StateDir
from tests.faults.chains import remembers
from tests.faults.killed import (
    SPEC,
    child,
    conversation,
    keep_locked,
    keep_saving,
    payload_of,
)
from tests.store.conftest import Opener
from tests.suites import NewSuite, sized

SEED = 10
KILLS_A_FOLDER = 20
LONGEST_S = 0.4
START_S = 2.0


@dataclass
class Oracle:
    """What processes that are dead now have told."""

    told: set[BlockHash] = field(default_factory=set)
    let_go: set[BlockHash] = field(default_factory=set)
    turns: dict[int, int] = field(default_factory=dict)

    def hear(self, name: int, messages: Iterator[bytes]) -> None:
        for message in messages:
            word, _, rest = message.partition(b" ")
            match word:
                case b"present":
                    self.told.add(BlockHash(rest))
                case b"letting":
                    self.let_go.add(BlockHash(rest))
                case b"head":
                    self.turns[name] = int(rest)

    @property
    def present(self) -> set[BlockHash]:
        return self.told - self.let_go


def said(tell: Connection) -> Iterator[bytes]:
    """All that was told before the end, which may be in the middle of a word."""
    try:
        while True:
            yield tell.recv_bytes()
    except (EOFError, OSError):
        return


def check(opener: Opener, oracle: Oracle) -> None:
    started = time.monotonic()
    store = opener.open()
    assert time.monotonic() - started < START_S
    try:
        assert not list(opener.state.tmp.iterdir()) and not opener.quarantined()
        assert opener.metric("restore_rejected_total", reason="missing") == 0
        for block_hash in oracle.present:
            block = store.find(block_hash)
            assert block is not None, "a block that was told to be there is lost"
            assert opener.read(block)
        for path in (opener.path / "blocks").rglob("*.safetensors"):
            block = store.find(BlockHash(bytes.fromhex(path.stem)))
            assert block is not None and opener.read(block)
        for name, num_turns in oracle.turns.items():
            agent = store.agents.get(f"agent-{name}")
            assert agent is not None
            assert remembers(agent.heads[0], conversation(name, num_turns))
    finally:
        opener.close()


@pytest.mark.requirement("F-01", "L-40")
@sized(short=6, full=500)
def test_killed_while_saving(num_cases: int, tmp_path: Path, suite: NewSuite) -> None:
    rng, num_blocks = Random(SEED), 0
    opener, oracle = Opener(tmp_path / "state", SPEC, payload_of), Oracle()
    with suite("F1 killed while saving", num_cases, SEED) as cases:
        for n in range(num_cases):
            if n % KILLS_A_FOLDER == 0:
                num_blocks += len(oracle.present)
                shutil.rmtree(opener.path, ignore_errors=True)
                oracle = Oracle()
            with cases.case(n):
                with child(keep_saving, opener.path, n) as (process, tell):
                    time.sleep(rng.uniform(0, LONGEST_S))
                    process.kill()
                    oracle.hear(n, said(tell))
                check(opener, oracle)
        assert num_blocks + len(oracle.present) > num_cases  # they were not killed too early


@pytest.mark.requirement("F-18")
@sized(short=3, full=50)
def test_a_killed_holder_of_the_lock(num_cases: int, tmp_path: Path, suite: NewSuite) -> None:
    with suite("F18 lock holder killed", num_cases, None) as cases:
        for n in range(num_cases):
            with cases.case(n), child(keep_locked, tmp_path) as (process, tell):
                assert tell.recv_bytes() == os.fsencode(tmp_path)
                signed = (tmp_path / "LOCK").read_text()
                assert signed.startswith(f"{process.pid} ")
                process.kill()
                process.join()
                StateDir.open(tmp_path).close()
