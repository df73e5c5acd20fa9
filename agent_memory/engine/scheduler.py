"""Which sequences compute how many tokens in the next step.  Pure policy: no MLX, clock or I/O.

A step has a budget of rows.  Running sequences that decode get a row each; what is left goes to
prompts in order of arrival, so a long prompt shares its steps with everyone who is being answered.
Sequences are admitted in order of arrival while there are fewer than `max_running`.  One that
begins with what another is just computing waits until that has been computed, and then has it from
memory; if the other leaves before, so much is taken over as was committed.  Engine thread only.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from agent_memory.block import common_tokens
from agent_memory.engine.sequence import Awaited, Sequence, State

MIN_SHARED = 64
"""Tokens that are sooner computed twice than waited for."""


class Work(NamedTuple):
    """`num_tokens` rows of a sequence; `samples` when they reach the end of what is known of it."""

    seq: Sequence
    num_tokens: int
    samples: bool


class Scheduler:
    def __init__(self, step_tokens: int, max_running: int) -> None:
        self.step_tokens = step_tokens
        self.max_running = max_running
        self.waiting: deque[Sequence] = deque()
        self.admitted: list[Sequence] = []  # restoring and running, in order of admission

    def __len__(self) -> int:
        return len(self.waiting) + len(self.admitted)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.admitted
        yield from self.waiting

    def add(self, seq: Sequence) -> None:
        assert seq.state is State.WAITING
        self.waiting.append(seq)

    @property
    def can_admit(self) -> bool:
        return bool(self.waiting) and len(self.admitted) < self.max_running

    def admit(self, remembered: Callable[[Sequence], int]) -> Sequence | None:
        """The next sequence to begin, if there is room for one.

        `remembered`: how many leading tokens of it are in memory.
        """
        if not self.can_admit:
            return None
        for seq in self.waiting:
            if not self._waits(seq, remembered):
                self.waiting.remove(seq)
                self.admitted.append(seq)
                return seq
        return None

    def _waits(self, seq: Sequence, remembered: Callable[[Sequence], int]) -> bool:
        if seq.awaits is None or not seq.awaits.pending:
            shared = self.shared_with(seq)
            seq.awaits = shared if shared and shared.pending else None
            if seq.awaits and seq.awaits.num_tokens - remembered(seq) < MIN_SHARED:
                seq.awaits = None
        return seq.awaits is not None

    def shared_with(self, seq: Sequence) -> Awaited | None:
        """The running sequence with which `seq` shares most of its prompt, if it is much."""
        shared = [
            Awaited(other, common_tokens(seq.prompt_bytes[:-4], other.prompt_bytes))
            for other in self.admitted
            if other.state is State.RUNNING and other is not seq
        ]
        most = max(shared, key=lambda s: s.num_tokens, default=None)
        return most if most and most.num_tokens >= MIN_SHARED else None

    def readmit(self, seq: Sequence) -> None:
        """One that was rewound waits again, before those that never ran."""
        assert seq.state is State.WAITING
        self.admitted.remove(seq)
        self.waiting.appendleft(seq)

    def remove(self, seq: Sequence) -> None:
        (self.admitted if seq in self.admitted else self.waiting).remove(seq)

    def next_step(self) -> list[Work]:
        """Decode rows first, then prompt chunks; never more than `step_tokens` rows together."""
        ready = [s for s in self.admitted if s.state is State.RUNNING and s.to_compute > 0]
        accused = [s for s in ready if s.alone]
        if accused:
            ready = accused[:1]
        step: list[Work] = []
        left = self.step_tokens
        for seq in sorted(ready, key=lambda s: s.to_compute > 1):  # stable
            if left == 0:
                break
            num_tokens = min(seq.to_compute, left)
            step.append(Work(seq, num_tokens, num_tokens == seq.to_compute))
            left -= num_tokens
        return step

    def check(self) -> None:
        assert len(self.admitted) <= self.max_running
        assert all(s.state is State.WAITING for s in self.waiting)
        assert all(s.state in (State.RESTORING, State.RUNNING) for s in self.admitted)
        assert len({id(s) for s in self}) == len(self)
