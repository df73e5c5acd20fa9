"""One request being computed: its tokens, its KV and where it stands.

Knows what has been computed of it and what is still to do.  Knows nothing of other sequences, of
MLX calls or of clocks.  Engine thread only.

    WAITING ──► RESTORING ──► RUNNING ──► FINISHED
       ▲            │            │
       └────────────┴────────────┘   after a failed step: what was committed is matched again

    tokens      0 ....... num_prompt ....... len(tokens)        known: prompt and what was generated
    KV          0 ........................... kv.length         computed, or in a step under way
    committed   0 .......... num_committed                      copied out as blocks of `chain`

Steps under way sample tokens that are not known yet (`in_flight`: one, or two while one step is
launched behind another), so

    to_compute = len(tokens) + in_flight - kv.length     1: decode;  more: prompt to prefill

Invariants: num_committed <= kv.length <= len(tokens) + in_flight; nothing leaves FINISHED.
"""

from collections import Counter
from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

from agent_memory.block import BLOCK_TOKENS, Block, BlockHash, token_bytes
from agent_memory.engine.mailbox import Stream
from agent_memory.kvcache.sequence_kv import SequenceKV
from agent_memory.model.grammar import Constraint
from agent_memory.model.sampler import Draw
from agent_memory.model.tokenizer import StopMatcher, TextStream
from agent_memory.request import Compared, FinishReason, GenerateRequest, Priority


class State(StrEnum):
    WAITING = "waiting"
    RESTORING = "restoring"
    RUNNING = "running"
    FINISHED = "finished"


TRANSITIONS = {
    State.WAITING: {State.RESTORING, State.RUNNING, State.FINISHED},
    State.RESTORING: {State.RUNNING, State.WAITING, State.FINISHED},
    State.RUNNING: {State.WAITING, State.FINISHED},
    State.FINISHED: set(),
}


class Awaited(NamedTuple):
    """The first `num_tokens` of a prompt, which another sequence computes, now or when the
    beginning of its own is restored."""

    seq: "Sequence"
    num_tokens: int

    @property
    def pending(self) -> bool:
        begun = self.seq.state in (State.RESTORING, State.RUNNING)
        return begun and self.seq.num_kept < self.num_tokens


class Sequence:
    def __init__(
        self,
        request: GenerateRequest,
        root: BlockHash,
        stream: Stream,
        max_new: int,
        draw: Callable[[int], Draw],
        end_of_turn: frozenset[int],
        text: TextStream,
        constraint: Constraint | None = None,
    ) -> None:
        assert request.prompt and max_new > 0
        self.request = request
        self.root = root  # what the chains of its tenant begin with
        self.stream = stream
        self.max_new = max_new
        self.draw = draw
        self.end_of_turn = end_of_turn
        self.text = text
        self.constraint = constraint  # has accepted what was generated, and nothing else
        self.counts = Counter[int]()  # how often each token was generated
        self.num_scored = 1  # of the prompt's tokens: their logprobs were sent; the first has none
        self.stop = StopMatcher(request.stop)
        self.state = State.WAITING
        self.tokens = list(request.prompt)
        self.prompt_bytes = token_bytes(request.prompt)
        self.arrival = 0  # numbered by the scheduler
        self.urgent = request.priority is Priority.INTERACTIVE
        self.put_back = False  # by a step that failed: it begins again before others begin
        self.reserve = 0  # tokens it has room for, all in all, since it was last admitted
        self.awaits: Awaited | None = None
        self.in_flight = 0
        self.kv: SequenceKV | None = None
        self.chain: list[Block] = []
        self.before: list[Block] = []  # the chain it had when it was last rewound
        self.passed: list[Block] = []  # partial blocks on its way, of no use at its end
        self.checkpoints: list[Block] = []  # of its own, and the one it went on from
        # Where others can go on from: before the answer's beginning, which the next prompt may
        # have otherwise, and where the prompts of those end that wait for this one.
        self.marked_at = {request.stable_tokens} if request.stable_tokens else set[int]()
        self.looked_at = 0.0  # monotonic, when its memory was looked for
        self.compared: Compared | None = None
        self.finish_reason: FinishReason | None = None
        self.started = False  # its Started event has been sent
        self.alone = False  # accused of a failed step: computed by itself until cleared
        self.accusations = 0

    def move(self, state: State) -> None:
        assert state in TRANSITIONS[self.state], f"{self.state} -> {state}"
        self.state = state

    @property
    def asker(self) -> tuple[str | None, str | None]:
        """Who takes turns with others.  All of a tenant without a name are one."""
        return self.request.tenant, self.request.agent

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def follows(self) -> bool:
        """How its next token is drawn depends on the one before it."""
        asked = self.request.sampling
        penalized = asked.frequency_penalty or asked.presence_penalty
        return self.constraint is not None or bool(penalized)

    @property
    def is_scoring(self) -> bool:
        """What it computes next is of its prompt, and somebody wants to know how likely it is."""
        return self.still_to_score and self.kv is not None and self.kv.length + 1 < self.num_prompt

    @property
    def still_to_score(self) -> bool:
        return self.request.prompt_logprobs and self.num_scored < self.num_prompt

    @property
    def matchable(self) -> list[int]:
        """The tokens that may be looked for in memory, where the last one's KV never counts: what
        is to be scored must be computed."""
        return self.tokens[: self.num_scored] if self.still_to_score else self.tokens

    @property
    def end(self) -> BlockHash:
        """What the next block of its chain will follow."""
        return self.chain[-1].hash if self.chain else self.root

    @property
    def num_committed(self) -> int:
        """Only the last block of a chain may be partial."""
        full = BLOCK_TOKENS * len(self.chain)
        return full - BLOCK_TOKENS + self.chain[-1].num_tokens if self.chain else 0

    @property
    def to_compute(self) -> int:
        """Tokens whose KV must still be computed before the next one can be sampled."""
        if self.kv is None or self.num_generated + self.in_flight >= self.max_new:
            return 0
        return len(self.tokens) + self.in_flight - self.kv.length

    @property
    def most_at_once(self) -> int:
        """Of these, so many can be in one step: it must end where states are to be marked."""
        to_mark = self.kv.num_to_mark if self.kv else None
        return self.to_compute if to_mark is None else min(self.to_compute, to_mark)

    @property
    def num_kept(self) -> int:
        """Leading tokens that are known and whose KV is computed: what can be remembered."""
        return min(self.kv.length, len(self.tokens)) if self.kv else 0

    def accept(self, token: int) -> str:
        """Take a sampled token -> the text that is final with it.  May set `finish_reason`."""
        assert self.in_flight > 0 and self.finish_reason is None
        silent = token in self.end_of_turn
        added = "" if silent else self.text.add(token)  # first: what raises changed nothing here
        self.in_flight -= 1
        self.tokens.append(token)
        self.counts[token] += 1
        if self.ends(token):
            self.finish_reason = FinishReason.STOP
            return self.stop.rest()
        if self.constraint is not None:
            self.constraint.accept(token)
        text = self.stop.add(added)
        if self.stop.hit is not None:
            self.finish_reason = FinishReason.STOP
        elif self.constraint is not None and self.constraint.is_over:
            self.finish_reason = FinishReason.STOP
            text += self.stop.rest()
        elif self.num_generated >= self.max_new:
            self.finish_reason = FinishReason.LENGTH
            text += self.stop.rest()
        return text

    def ends(self, token: int) -> bool:
        return token in self.end_of_turn and not self.request.ignore_end

    def rewind(self) -> None:
        """Back to waiting with everything known; what was computed and not committed is lost."""
        self.move(State.WAITING)
        self.in_flight = 0
        self.kv = None
        self.before = self.chain or self.before
        self.passed += [block for block in self.chain[-1:] if not block.full]
        self.chain = []

    def check(self) -> None:
        assert self.counts.total() == self.num_generated and self.num_scored <= self.num_prompt
        if self.kv is not None and self.state is State.RUNNING:
            assert self.num_committed <= self.kv.length <= len(self.tokens) + self.in_flight
            self.kv.check()
