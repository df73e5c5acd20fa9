"""The whole policy at work on a simulated engine, and what must hold in each of its turns.

Scheduler, shares, ledger, room and pool are the real ones; a step computes by counting.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_memory.block import BLOCK_TOKENS, HASH_BYTES, Block, BlockHash, in_blocks, token_bytes
from agent_memory.engine.ledger import Ledger
from agent_memory.engine.mailbox import Stream
from agent_memory.engine.room import Cost, Room
from agent_memory.engine.scheduler import PROMOTE_ROWS, Scheduler, Work
from agent_memory.engine.sequence import Sequence, State
from agent_memory.engine.shares import TURN_ROWS
from agent_memory.kv_spec import KVSpec, LayerGroup, TensorFormat
from agent_memory.kvcache.block_pool import BlockPool
from agent_memory.kvcache.sequence_kv import SequenceKV
from agent_memory.model.sampler import Draw
from agent_memory.request import GenerateRequest, Priority, SamplingParams
from tests.conftest import builtin_model

FORM = TensorFormat(64, "F32")
SPEC = KVSpec((LayerGroup("full", (0,), 1, FORM, FORM),), "digest")
COST = Cost(token_bytes=10, sequence_bytes=0, context_bytes=2)
WRITE_TURNS = 3
FIXED = {"weights": 1000, "headroom": 500}
INTERACTIVE, BACKGROUND = Priority.INTERACTIVE, Priority.BACKGROUND


@dataclass(frozen=True)
class Asked:
    turn: int
    agent: str
    num_prompt: int
    max_new: int
    priority: Priority
    leaves_after: int | None = None
    """Turns from when it came to when its client goes."""


@dataclass
class Life:
    begun: int = 0
    ended: bool = False


@dataclass
class Simulated:
    scheduler: Scheduler
    num_tokens: int
    """The most that one sequence may have."""
    lives: dict[Sequence, Life] = field(default_factory=dict)
    rows: int = 0
    preempted: int = 0
    committed: int = 0

    def __post_init__(self) -> None:
        per_token = COST.token_bytes + COST.context_bytes
        budget = sum(FIXED.values()) + per_token * (self.num_tokens + BLOCK_TOKENS)
        self.pool = BlockPool(budget)
        self.writing: deque[list[Block]] = deque([[]])
        self.room = Room(
            Ledger(budget, FIXED),
            COST,
            self.scheduler,
            self.pool,
            needs=lambda seq: in_blocks(seq.reserve),
            runs=lambda: 0,
            preempt=self.preempt,
        )

    def submit(self, asked: Asked, number: int) -> Sequence:
        prompt = tuple(range(10_000 * number, 10_000 * number + asked.num_prompt))
        seq = Sequence(
            GenerateRequest(
                str(number), asked.agent, prompt, SamplingParams(), priority=asked.priority
            ),
            BlockHash(bytes(HASH_BYTES)),
            Stream(),
            asked.max_new,
            lambda _position: Draw(None, 0),
            frozenset(),
            builtin_model(None).tokenizer.stream(),
        )
        self.lives[seq] = Life()
        self.scheduler.add(seq)
        return seq

    def preempt(self, seq: Sequence) -> None:
        self.preempted += 1
        seq.rewind()
        self.scheduler.readmit(seq)
        self.room.release(seq)

    def end(self, seq: Sequence) -> None:
        assert not self.lives[seq].ended  # once only
        self.lives[seq].ended = True
        self.scheduler.remove(seq)
        self.room.release(seq)
        assert not self.room.ledger.held_by(seq)
        seq.move(State.FINISHED)
        seq.kv = None

    def turn(self) -> list[Work]:
        before = self.preempted
        self.write()
        self.admit()
        for seq in self.room.short():
            if seq.state is State.RUNNING and not self.room.grow(seq):
                self.preempt(seq)
        self.check()
        step = self.scheduler.next_step()
        self.check_step(step, before)
        for seq, num_tokens, samples in step:
            self.compute(seq, num_tokens, samples)
        self.check()
        return step

    def admit(self) -> None:
        while seq := self.scheduler.admit(lambda _: 0, self.has_room):
            if self.room.is_too_long(seq):
                self.end(seq)
                continue
            self.lives[seq].begun += 1
            seq.kv = SequenceKV(SPEC, None, seq.reserve)
            seq.move(State.RUNNING)
            self.room.hold(seq, seq.kv.room)
        self.room.level()

    def has_room(self, seq: Sequence) -> bool:
        before = self.preempted
        admitted = self.room.admits(seq)
        assert admitted or self.preempted == before  # nobody is sent back in vain
        return admitted

    def compute(self, seq: Sequence, num_tokens: int, samples: bool) -> None:
        assert seq.kv is not None
        self.rows += num_tokens
        for _ in range(seq.kv.length // BLOCK_TOKENS, (seq.kv.length + num_tokens) // BLOCK_TOKENS):
            self.commit()
        seq.kv.length += num_tokens
        assert seq.kv.length <= seq.kv.room  # it has a place for all of it
        if samples:
            seq.tokens.append(5)
            if seq.num_generated == seq.max_new:
                self.end(seq)

    def commit(self) -> None:
        """Some block, if the pool has room: held until it is written."""
        self.committed += 1
        block = Block.of(SPEC.fingerprint, token_bytes([self.committed]))
        if self.pool.put(block, np.zeros(BLOCK_TOKENS * COST.token_bytes, np.uint8)):
            self.pool.hold(block.hash)
            self.writing[-1].append(block)

    def write(self) -> None:
        """What was committed WRITE_TURNS ago."""
        self.writing.append([])
        for block in self.writing.popleft() if len(self.writing) > WRITE_TURNS else []:
            self.pool.release(block.hash)

    def check(self) -> None:
        self.scheduler.check()
        self.pool.check()
        self.room.check()
        ledger = self.room.ledger
        assert ledger.holders() <= set(self.scheduler.admitted)
        assert 0 <= ledger.used_bytes <= ledger.budget_bytes
        running = [seq for seq in self.scheduler.admitted if seq.kv is not None]
        tails = sum(COST.tail(seq.kv.room) for seq in running if seq.kv is not None)
        assert ledger.figures()["tails"] == tails  # what is held is what there is

    def check_step(self, step: list[Work], before: int) -> None:
        """Each once, within the budget, and as much as there is to do."""
        rows = sum(work.num_tokens for work in step)
        assert len({id(work.seq) for work in step}) == len(step)
        assert all(work.seq in self.scheduler.admitted for work in step)
        todo = sum(seq.to_compute for seq in self.scheduler.admitted)
        assert rows == min(todo, self.scheduler.step_tokens)
        held = self.pool.num_bytes > self.pool.idle_bytes  # room to come, when that is written
        assert rows or not len(self.scheduler) or held or self.preempted > before


asked = st.builds(
    Asked,
    turn=st.integers(0, 30),
    agent=st.sampled_from("abc"),
    num_prompt=st.integers(1, 1500),
    max_new=st.integers(1, 700),
    priority=st.sampled_from(list(Priority)),
    leaves_after=st.none() | st.integers(0, 60),
)


@pytest.mark.requirement("B-21", "F-21")
@settings(max_examples=150, deadline=None)
@given(
    st.lists(asked, min_size=1, max_size=14),
    st.integers(2048, 6000),
    st.sampled_from([8, 64, 256]),
    st.integers(1, 6),
)
def test_everything_holds_whatever_comes_and_goes(
    load: list[Asked], num_tokens: int, step_tokens: int, max_running: int
) -> None:
    """Within the budget, each once a step, nothing idle, all ended once, nothing left behind."""
    engine = Simulated(Scheduler(step_tokens, max_running), num_tokens)
    turn, leaving = 0, dict[int, list[Sequence]]()
    while turn <= 30 or len(engine.scheduler):
        for number, one in enumerate(load):
            if one.turn == turn:
                seq = engine.submit(one, number)
                if one.leaves_after is not None:
                    leaving.setdefault(turn + one.leaves_after, []).append(seq)
        for seq in leaving.pop(turn, []):
            if not engine.lives[seq].ended:
                engine.end(seq)
        engine.turn()
        turn += 1
        assert turn < 200_000
    assert len(engine.lives) == len(load) and all(life.ended for life in engine.lives.values())
    assert not engine.room.ledger.holders()


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.integers(100, 1500), st.integers(1, 40), st.integers(1, 3))
def test_background_work_ends_though_interactive_work_never_stops(
    num_background: int, num_prompt: int, max_new: int, max_running: int
) -> None:
    """In bounded rows each, though there is always more interactive work than there are places."""
    engine = Simulated(Scheduler(256, max_running), 4000)
    patient = [
        engine.submit(Asked(0, "night", num_prompt, max_new, BACKGROUND), n)
        for n in range(num_background)
    ]
    number = 100
    each = 2 * PROMOTE_ROWS + 8 * (TURN_ROWS + num_prompt + max_new) * (max_running + 2)
    while not all(engine.lives[seq].ended for seq in patient):
        waiting = sum(seq.urgent for seq in engine.scheduler.waiting)
        for _ in range(max_running + 1 - waiting):
            engine.submit(Asked(0, f"day-{number}", 300, 20, INTERACTIVE), number)
            number += 1
        engine.turn()
        assert engine.rows <= (num_background + 1) * each
    assert engine.rows > PROMOTE_ROWS  # it did wait


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 30), st.integers(300, 1200))
def test_an_agent_that_asks_much_does_not_keep_another_waiting(
    num_greedy: int, num_prompt: int
) -> None:
    engine = Simulated(Scheduler(256, 1), 4000)
    for n in range(num_greedy):
        engine.submit(Asked(0, "greedy", num_prompt, 2, INTERACTIVE), n)
    for _ in range(3):
        engine.turn()
    modest = engine.submit(Asked(0, "modest", num_prompt, 2, INTERACTIVE), 100)
    came = engine.rows
    while not engine.lives[modest].ended:
        engine.turn()
    assert engine.rows - came <= 2 * TURN_ROWS + 3 * (num_prompt + 2)


@settings(max_examples=10, deadline=None)
@given(st.integers(600, 1500), st.integers(1, 700))
def test_what_was_sent_back_goes_on_and_ends(num_prompt: int, max_new: int) -> None:
    engine = Simulated(Scheduler(256, 4), 2300)
    slow = engine.submit(Asked(0, "slow", num_prompt, 700, BACKGROUND), 0)
    for _ in range(12):
        engine.turn()
    known = len(slow.tokens)
    quick = engine.submit(Asked(0, "quick", 1500, max_new, INTERACTIVE), 1)
    while not engine.lives[quick].ended:
        engine.turn()
    assert engine.preempted == 1 and len(slow.tokens) >= known  # it keeps what it generated
    while not engine.lives[slow].ended:
        engine.turn()
    assert engine.lives[slow].begun == 2 and slow.num_generated == 700


def test_nobody_is_sent_back_in_vain_and_the_pool_has_what_is_left() -> None:
    """A first one that stays, background work beside it, a third that does not fit even so."""
    engine = Simulated(Scheduler(256, 4), 2300)
    for agent, num_prompt, priority in (("a", 900, INTERACTIVE), ("b", 300, BACKGROUND)):
        engine.submit(Asked(0, agent, num_prompt, 200, priority), num_prompt)
        engine.turn()
    assert len(engine.scheduler.admitted) == 2
    engine.submit(Asked(0, "c", 1700, 200, INTERACTIVE), 1)
    for _ in range(20):
        engine.turn()
    assert engine.preempted == 0 and len(engine.scheduler.waiting) == 1
    assert engine.pool.num_bytes > 0
