"""Which sequences compute how many tokens in the next step.  Pure policy: no MLX, clock or I/O.

A step has a budget of rows.  Running sequences that decode get a row each; what is left goes to
prompts, so a long prompt shares its steps with everyone who is being answered.  Prompts, and those
who wait to begin, come in one order:

    put back by a failed step  ·  interactive before background  ·  agents in turn  ·  arrival

Background work that got nothing while PROMOTE_ROWS rows were computed for others counts as
interactive from then on, one sequence at a time: it waits long, but never for ever.  Interactive
work that has no room may send background work back to wait.

A sequence that begins with what another is just computing waits until that has been computed, and
then has it from memory; if the other leaves before, so much is taken over as was committed.  Engine
thread only.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from agent_memory.block import common_tokens
from agent_memory.engine.sequence import Awaited, Sequence, State
from agent_memory.engine.shares import Shares

MIN_SHARED = 64
"""Tokens that are sooner computed twice than waited for."""
PROMOTE_ROWS = 8192


class Work(NamedTuple):
    """`num_tokens` rows of a sequence; `samples` when they reach the end of what is known of it."""

    seq: Sequence
    num_tokens: int
    samples: bool


class Scheduler:
    def __init__(self, step_tokens: int, max_running: int, most_scored: int | None = None) -> None:
        """`most_scored`: rows of prompts that are scored, in one step."""
        self.step_tokens = step_tokens
        self.most_scored = most_scored or step_tokens
        self.max_running = max_running
        self.waiting: list[Sequence] = []
        self.admitted: list[Sequence] = []  # restoring and running, in order of admission
        self._shares = Shares()
        self._arrivals = 0
        self._rows = 0  # computed so far
        self._background_rows = 0  # of these, when background work last got some for a prompt

    def __len__(self) -> int:
        return len(self.waiting) + len(self.admitted)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.admitted
        yield from self.waiting

    def add(self, seq: Sequence) -> None:
        assert seq.state is State.WAITING
        self._arrivals += 1
        seq.arrival = self._arrivals
        self._shares.come(seq.asker)
        self.waiting.append(seq)

    @property
    def full(self) -> bool:
        return len(self.admitted) >= self.max_running

    @property
    def can_admit(self) -> bool:
        """Whether there is a place, or somebody who yields his."""
        if not self.full:
            return bool(self.waiting)
        yielding = any(s.state is State.RUNNING and not s.urgent for s in self.admitted)
        return yielding and any(s.urgent for s in self.waiting)

    def admit(
        self, remembered: Callable[[Sequence], int], has_room: Callable[[Sequence], bool]
    ) -> Sequence | None:
        """The next sequence to begin.  Nobody overtakes one that has no room: it would wait long.

        `remembered`: how many leading tokens of it are in memory.  `has_room`: whether its KV fits;
        it may send others back for that.
        """
        if not self.can_admit:
            return None
        for seq in sorted(self.waiting, key=self._order):
            if self._waits(seq, remembered):
                continue
            if not has_room(seq) or self.full:
                return None
            self.waiting.remove(seq)
            self.admitted.append(seq)
            seq.put_back = False
            return seq
        return None

    def _order(self, seq: Sequence) -> tuple[bool, bool, int, int]:
        if seq.put_back:  # newest first: the others of its step have been proven by more steps
            return False, False, 0, -seq.arrival
        return True, not seq.urgent, self._shares.turn(seq.asker), seq.arrival

    def yielding_to(self, seq: Sequence) -> list[Sequence]:
        """Who goes back to wait when `seq` has no room, first who goes first.

        For one that wants to begin it is background work, if it is not background itself; for one
        that grows, also what is no more urgent than it and came later.
        """
        running = [other for other in self.admitted if other.state is State.RUNNING]
        if seq.state is State.RUNNING:
            yielding = [other for other in running if _rank(other) < _rank(seq)]
        else:
            yielding = [other for other in running if seq.urgent and not other.urgent]
        return sorted(yielding, key=_rank)

    def _waits(self, seq: Sequence, remembered: Callable[[Sequence], int]) -> bool:
        if seq.awaits is None or not seq.awaits.pending:
            shared = self.shared_with(seq)
            later = shared and seq.urgent and not shared.seq.urgent  # it may be passed over
            seq.awaits = shared if shared and shared.pending and not later else None
            if seq.awaits and seq.awaits.num_tokens - remembered(seq) < MIN_SHARED:
                seq.awaits = None
            if seq.awaits:
                seq.awaits.seq.marked_at.add(seq.awaits.num_tokens)
        return seq.awaits is not None

    def shared_with(self, seq: Sequence) -> Awaited | None:
        """The tenant's admitted sequence with which `seq` shares most of its prompt, if it is much,
        and if `seq` may have it from memory."""
        if seq.still_to_score:
            return None
        shared = [
            Awaited(other, common_tokens(seq.prompt_bytes[:-4], other.prompt_bytes))
            for other in self.admitted
            if other is not seq and other.root == seq.root
        ]
        most = max(shared, key=lambda s: s.num_tokens, default=None)
        return most if most and most.num_tokens >= MIN_SHARED else None

    def readmit(self, seq: Sequence) -> None:
        """One that was rewound waits again."""
        assert seq.state is State.WAITING
        self.admitted.remove(seq)
        self.waiting.append(seq)

    def remove(self, seq: Sequence) -> None:
        (self.admitted if seq in self.admitted else self.waiting).remove(seq)
        self._shares.leave(seq.asker)

    def next_step(self) -> list[Work]:
        """Decode rows first, then prompt chunks; never more than `step_tokens` rows together."""
        self._promote()
        ready = [s for s in self.admitted if s.state is State.RUNNING and s.to_compute > 0]
        accused = [s for s in ready if s.alone]
        if accused:
            ready = accused[:1]
        step: list[Work] = []
        left, to_score = self.step_tokens, self.most_scored
        for seq in sorted(ready, key=lambda s: (s.to_compute > 1, self._order(s))):
            if left == 0:
                break
            num_tokens = min(seq.most_at_once, left, to_score if seq.is_scoring else left)
            if not num_tokens:
                continue
            to_score -= num_tokens if seq.is_scoring else 0
            step.append(Work(seq, num_tokens, num_tokens == seq.to_compute))
            left -= num_tokens
        for work in step:
            self._shares.give(work.seq.asker, work.num_tokens)
        self._rows += self.step_tokens - left
        if any(not work.seq.urgent and work.seq.to_compute > 1 for work in step):
            self._background_rows = self._rows
        return step

    def _promote(self) -> None:
        """The next of the background work, once it has been passed over for long enough."""
        passed_over = [
            seq
            for seq in self
            if not seq.urgent and (seq.state is State.WAITING or seq.to_compute > 1)
        ]
        if not passed_over:
            self._background_rows = self._rows
        elif self._rows - self._background_rows > PROMOTE_ROWS:
            min(passed_over, key=self._order).urgent = True
            self._background_rows = self._rows

    def check(self) -> None:
        assert len(self.admitted) <= self.max_running
        assert all(s.state is State.WAITING for s in self.waiting)
        assert all(s.state in (State.RESTORING, State.RUNNING) for s in self.admitted)
        assert len({id(s) for s in self}) == len(self)
        self._shares.check()


def _rank(seq: Sequence) -> tuple[bool, int]:
    """Lower yields first: background work, and of the same urgency what came last."""
    return seq.urgent, -seq.arrival
