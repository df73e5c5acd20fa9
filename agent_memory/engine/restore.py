"""What is brought back, while it is: spans of remembered blocks, and the run they are written into.

Plain state, no decisions; memory.py makes them.  Engine thread only.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from agent_memory.block import Block, BlockHash
from agent_memory.engine.sequence import Sequence
from agent_memory.kvcache.run import RunBuilder

MOST_COPIED = 64
"""Tokens of a run that every sequence copies: a template's first words, which all prompts have."""


@dataclass(frozen=True, slots=True)
class Span:
    """The first `count` tokens of a remembered block, at position `start` of a prompt; or, as the
    last of some spans and with a count of 0, the checkpoint there."""

    block: Block
    start: int
    count: int


@dataclass(eq=False, slots=True)
class Restore:
    """A run being put together.  `todo`: payloads that are here; the pool holds them, or not."""

    spans: list[Span]
    builder: RunBuilder
    waiting: list[Sequence]
    missing: int
    from_disk: set[int]
    began: float
    failed: set[int] = field(default_factory=set)
    todo: deque[tuple[int, np.ndarray, bool]] = field(default_factory=deque)
    given_up: bool = False

    @property
    def key(self) -> BlockHash:
        return run_key(self.spans)

    @property
    def settled(self) -> bool:
        return not self.todo and not self.missing and (self.builder.grown or self.given_up)

    @property
    def usable(self) -> list[Span]:
        return [] if self.given_up else self.spans[: min(self.failed, default=len(self.spans))]


@dataclass(frozen=True, slots=True)
class Restored:
    """Where a sequence's cached tokens came from."""

    seq: Sequence
    from_memory: int
    from_disk: int


def run_key(spans: list[Span]) -> BlockHash:
    """Names all tokens up to the end of the spans, whichever block the last of them are from."""
    block, count = spans[-1].block, spans[-1].count
    if block.is_checkpoint:
        return block.hash
    return Block.of(block.parent, block.tokens[: 4 * count]).hash
