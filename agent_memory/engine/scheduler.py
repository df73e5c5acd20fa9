"""Which sequences compute how many tokens in the next step.  Pure policy: no MLX, clock or I/O.

A step has a budget of rows.  Running sequences that decode get a row each; what is left goes to
prompts in order of arrival, so a long prompt shares its steps with everyone who is being answered.
Sequences are admitted in order of arrival while there are fewer than `max_running`.  Engine thread
only.
"""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from agent_memory.engine.sequence import Sequence, State


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

    def admit(self) -> Sequence | None:
        """The next sequence to begin, if there is room for one."""
        if not self.can_admit:
            return None
        seq = self.waiting.popleft()
        self.admitted.append(seq)
        return seq

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
