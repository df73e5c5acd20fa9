"""Room in memory for sequences: who may begin, who may grow, and who goes back to wait for that.

    does not fit  ─►  idle blocks leave the pool  ─►  who yields goes back to wait  ─►  it waits

Nothing is evicted and nobody sent away in vain.  What sequences do not need the pool may have, up
to its own budget.  Of two that grow the one that came first wins, so somebody always comes to an
end; one that does not fit even alone ends for want of room, as at the end of a context.

Decides by numbers: the ledger's, the scheduler's, the pool's.  No MLX.  Engine thread only.
"""

from collections.abc import Callable
from dataclasses import dataclass

from agent_memory.block import in_blocks
from agent_memory.engine.ledger import Ledger, account
from agent_memory.engine.scheduler import Scheduler
from agent_memory.engine.sequence import Sequence, State
from agent_memory.kvcache.block_pool import BlockPool

RESERVE_NEW_TOKENS = 512
"""A sequence begins with room for so much of its answer; for more it asks as it grows."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes of KV per token, and of what a sequence has besides however long it is; and what a
    step works with per token before its rows, at most."""

    token_bytes: int
    sequence_bytes: int
    context_bytes: int

    def tail(self, num_tokens: int) -> int:
        return self.sequence_bytes + in_blocks(num_tokens) * self.token_bytes

    def run_and_tail(self, num_tokens: int) -> int:
        """Of so many tokens in both, the tail's already in whole blocks."""
        return self.sequence_bytes + num_tokens * self.token_bytes

    def most_tokens(self, budget_bytes: int) -> int:
        """That one sequence can have when it is alone; a block goes to rounding its tail."""
        per_token = max(1, self.token_bytes + self.context_bytes)
        return max(0, (budget_bytes - self.sequence_bytes) // per_token - in_blocks(1))


def tokens_to_begin(prompt_tokens: int, max_new: int) -> int:
    return prompt_tokens + min(max_new, RESERVE_NEW_TOKENS)


class Room:
    """`needs`: tokens of new memory a sequence takes if it begins now.  `runs`: their bytes now.
    `preempt`: send one back to wait.  `model`: whose sequences these are; others may have rooms on
    the same ledger."""

    def __init__(
        self,
        ledger: Ledger,
        cost: Cost,
        scheduler: Scheduler,
        pool: BlockPool,
        needs: Callable[[Sequence], int],
        runs: Callable[[], int],
        preempt: Callable[[Sequence], None],
        model: str = "",
    ) -> None:
        self.ledger = ledger
        self.model = model
        self._cost = cost
        self._scheduler = scheduler
        self._pool = pool
        self._needs = needs
        self._runs = runs
        self._preempt = preempt
        self.closed = False  # nobody new begins; who was sent back goes on
        self._refused: tuple[Sequence, int] | None = None  # and what could be had then

    @property
    def _most_tokens(self) -> int:
        return self._cost.most_tokens(self.ledger.spare_bytes)

    # ── begin ────────────────────────────────────────────────────────────────────────────────

    def admits(self, seq: Sequence) -> bool:
        """Whether a waiting sequence can begin, if need be in the place of others."""
        left = seq.max_new - seq.num_generated
        seq.reserve = min(tokens_to_begin(len(seq.tokens), left), self._most_tokens)
        if self.is_too_long(seq):
            return True  # only to end
        if self.closed and not seq.started:
            return False
        self.measure()
        yielding = self._scheduler.yielding_to(seq)
        available = self.ledger.free_bytes + self._pool.idle_bytes
        available += sum(self.ledger.held_by(other) for other in yielding)
        if self._refused and self._refused[0] is seq and available <= self._refused[1]:
            return False
        context = self._context_bytes(seq.reserve)
        nbytes = self._cost.tail(seq.reserve + in_blocks(1)) + context
        if nbytes > self.ledger.free_bytes:
            nbytes = self._cost.run_and_tail(self._needs(seq)) + context
        admitted = self._make(nbytes, seq, slot=self._scheduler.full)
        self._refused = None if admitted else (seq, available)
        return admitted

    @property
    def is_short(self) -> bool:
        """Somebody waits for memory, and not for a place among the running.  Any thread."""
        refused = None if self._scheduler.full else self._refused
        return refused is not None and refused[0].state is State.WAITING

    def is_too_long(self, seq: Sequence) -> bool:
        """One that was admitted: not even alone would there be room for one token more."""
        return seq.reserve <= len(seq.tokens)

    def hold(self, seq: Sequence, own_tokens: int) -> None:
        """It has begun, with a tail of so many."""
        self.ledger.hold(seq, self._cost.tail(own_tokens))
        self.level()

    def release(self, seq: Sequence) -> None:
        self.ledger.release(seq)

    # ── grow ─────────────────────────────────────────────────────────────────────────────────

    def short(self) -> list[Sequence]:
        """Those whose next token has no place, the first to come first."""
        short = [
            seq
            for seq in self._scheduler.admitted
            if seq.state is State.RUNNING and seq.to_compute and seq.kv and not seq.kv.num_free
        ]
        return sorted(short, key=lambda seq: seq.arrival)

    def grow(self, seq: Sequence) -> bool:
        """By a quarter, or at least by a block."""
        assert seq.kv is not None
        have = seq.kv.room
        left = in_blocks(max(1, seq.max_new - seq.num_generated))
        for more in (min(in_blocks(have // 4 + 1), left), in_blocks(1)):
            if seq.state is not State.RUNNING:
                break  # it ended with the step that was settled to send others back
            new_length = seq.kv.length + more
            if seq.kv.length < self._most_tokens and self._make(
                more * self._cost.token_bytes + self._context_bytes(new_length), seq
            ):
                if seq.state is State.RUNNING:  # still, though the step under way was settled
                    seq.kv.grow_to(have + more)
                    seq.reserve = max(seq.reserve, new_length)
                    self.hold(seq, have + more)
                return True
        return False

    # ── both ─────────────────────────────────────────────────────────────────────────────────

    def level(self) -> None:
        """The pool may have what nobody else needs."""
        self.measure()
        self._pool.resize(self._pool.num_bytes + self.ledger.free_bytes)
        self.measure()

    def outgrown(self) -> list[Sequence]:
        """Who should go, first who goes first, when more is used than was decided."""
        if self.ledger.free_bytes >= 0:
            return []
        running = [seq for seq in self._scheduler.admitted if seq.state is State.RUNNING]
        eldest = min(running, key=lambda seq: (not seq.urgent, seq.arrival), default=None)
        return self._scheduler.yielding_to(eldest) if eldest else []

    def _make(self, nbytes: int, seq: Sequence, *, slot: bool = False) -> bool:
        """Make room for so much more, and a place among the running; all of it or nothing."""
        self.measure()
        missing = nbytes - self.ledger.free_bytes
        idle_bytes = self._pool.idle_bytes if missing > 0 else 0
        leaving: list[Sequence] = []
        for other in self._scheduler.yielding_to(seq) if slot or missing > idle_bytes else ():
            if missing <= idle_bytes and (leaving or not slot):
                break
            leaving.append(other)
            missing -= self.ledger.held_by(other)
        if missing > idle_bytes or (slot and not leaving):
            return False
        for other in leaving:
            if other.state is State.RUNNING:  # none that ended with the step under way
                self._preempt(other)
        self.measure()
        self._pool.resize(self._pool.num_bytes + self.ledger.free_bytes - nbytes)
        self.measure()
        return self.ledger.free_bytes >= nbytes

    def _context_bytes(self, num_tokens: int) -> int:
        """What a step needs beyond now when a context so long is in it."""
        return self._cost.context_bytes * max(0, num_tokens - self._longest())

    def _longest(self) -> int:
        return max((seq.reserve for seq in self._scheduler.admitted), default=0)

    def measure(self) -> None:
        self.ledger.measure("pool", self._pool.num_bytes)
        self.ledger.measure(account("runs", self.model), self._runs())
        context_bytes = self._cost.context_bytes * self._longest()
        self.ledger.measure(account("context", self.model), context_bytes)

    def would_do(self, spare_bytes: int) -> bool:
        """Whether everybody here could still begin and go on if only so much were to spare."""
        most = self._cost.most_tokens(spare_bytes)
        left = ((len(seq.tokens), seq.max_new - seq.num_generated) for seq in self._scheduler)
        return all(tokens_to_begin(known, new) <= most for known, new in left)

    def check(self) -> None:
        """When nothing is under way."""
        self.measure()
        assert not self.ledger.holders() & set(self._scheduler.waiting)
