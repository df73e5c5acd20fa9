"""What happens between a step's logits and its tokens: which rows are drawn from, how, and scored.

Knows sequences and what their requests ask of tokens.  Launches nothing by itself and settles
nothing; step_loop.py does.  Engine thread only.

    logits of a step    A: 1 row     B: 1 row    C: 5 rows, for its prompt is scored
    drawn from          A's          B's         C's last, if its prompt ends there
    scored              A's drawn, if asked      rows 0 to 4: tokens 1 to 5 of C's piece
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from agent_memory.engine.scheduler import Work
from agent_memory.engine.sequence import Sequence, State
from agent_memory.errors import BadRequest
from agent_memory.model.logprobs import Scores, score
from agent_memory.model.sampler import Draw, penalties, sample
from agent_memory.request import TokenLogprob

Refuse = Callable[[Sequence, BadRequest], None]
NOBODYS = Draw(None, 0)
"""Of a row whose token nobody takes."""


class Piece(NamedTuple):
    """What a step computes of a sequence: `num_tokens` tokens from position `start` on."""

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool
    scored: bool

    @classmethod
    def of(cls, work: Work) -> "Piece":
        assert work.seq.kv is not None
        start = work.seq.kv.length
        return cls(work.seq, start, work.num_tokens, work.samples, work.seq.is_scoring)

    @property
    def num_logits(self) -> int:
        return self.num_tokens if self.scored else int(self.samples)

    @property
    def follows(self) -> bool:
        """Its token can be drawn only when the one before it is known, and it is not yet."""
        return self.samples and self.seq.follows and self.seq.in_flight > 0


@dataclass(slots=True)
class Flight:
    """A launched step.  `rows[seq]` is the row of `tokens` with its sampled token.  `scores` are
    those of the tokens sampled for `scored`, `prompts` those of prompts from a position on."""

    seqs: list[Sequence]
    rows: dict[Sequence, int]
    tokens: mx.array
    scored: list[Sequence]
    scores: Scores | None
    prompts: list[tuple[Sequence, int, Scores]]

    @property
    def has_first_token(self) -> bool:
        return any(seq.num_generated == 0 for seq in self.rows)

    def send(self) -> None:
        every = [self.scores, *(scores for _, _, scores in self.prompts)]
        mx.async_eval(self.tokens, [scores.arrays for scores in every if scores])

    def read(self) -> "Settled":
        """Waits for the step."""
        tokens = np.array(self.tokens)
        scores = self.scores.read() if self.scores else []
        logprobs = {
            seq: replace(one, top=one.top[: seq.request.logprobs])
            for seq, one in zip(self.scored, scores, strict=True)
        }
        return Settled(
            {seq: int(tokens[row]) for seq, row in self.rows.items()},
            logprobs,
            [(seq, first, scores.read()) for seq, first, scores in self.prompts],
        )


class Settled(NamedTuple):
    """A step's outcome.  `prompts`: from the token at some position on."""

    tokens: dict[Sequence, int]
    logprobs: dict[Sequence, TokenLogprob]
    prompts: list[tuple[Sequence, int, list[TokenLogprob]]]


def draw(logits: mx.array, pieces: list[Piece], refuse: Refuse) -> Flight:
    """The logits of all pieces -> what was drawn, not evaluated.  `refuse` is told whose grammar
    cannot be followed; its row is nobody's from then on."""
    sampling = [piece.seq for piece in pieces if piece.samples]
    prompts = _prompts(logits, pieces)
    if sampling:
        own = _drawn_from(logits, pieces)
        tokens = sample(own, [_draw_of(seq, refuse) for seq in sampling])
        scored, scores = _scored(own, tokens, sampling)
    else:  # nothing is wanted, but everything must be computed
        tokens, scored, scores = mx.argmax(logits), [], None
    rows = {seq: row for row, seq in enumerate(sampling)}
    return Flight([piece.seq for piece in pieces], rows, tokens, scored, scores, prompts)


def _drawn_from(logits: mx.array, pieces: list[Piece]) -> mx.array:
    """The last row of each piece that samples."""
    if not any(piece.scored for piece in pieces):
        return logits
    ends = np.cumsum([piece.num_logits for piece in pieces])
    rows = [int(end) - 1 for end, piece in zip(ends, pieces, strict=True) if piece.samples]
    return logits[mx.array(rows)]


def _draw_of(seq: Sequence, refuse: Refuse) -> Draw:
    if seq.state is not State.RUNNING:  # it ended while its logits were computed
        return NOBODYS
    how = seq.draw(len(seq.tokens) + seq.in_flight)
    if not seq.follows:
        return how
    assert seq.in_flight == 0
    try:
        return how._replace(
            penalties=penalties(seq.request.sampling, seq.counts),
            allowed=seq.constraint.mask() if seq.constraint else None,
        )
    except BadRequest as error:
        refuse(seq, error)
        return NOBODYS


def _scored(
    logits: mx.array, tokens: mx.array, sampling: list[Sequence]
) -> tuple[list[Sequence], Scores | None]:
    """Scores of the tokens just drawn for those who asked."""
    asked = [(row, seq) for row, seq in enumerate(sampling) if seq.request.logprobs is not None]
    if not asked:
        return [], None
    rows = mx.array([row for row, _ in asked])
    num_top = max(seq.request.logprobs or 0 for _, seq in asked)
    return [seq for _, seq in asked], score(logits[rows], tokens[rows], num_top)


def _prompts(logits: mx.array, pieces: list[Piece]) -> list[tuple[Sequence, int, Scores]]:
    """Of each piece that is scored, the scores of the prompt's tokens after its first."""
    scores, row = [], 0
    for piece in pieces:
        if piece.scored:
            first = piece.start + 1
            known = piece.seq.request.prompt[first : first + piece.num_tokens]
            rows = logits[row : row + len(known)]
            num_top = piece.seq.request.logprobs or 0
            scores.append((piece.seq, first, score(rows, mx.array(known), num_top)))
        row += piece.num_logits
    return scores
