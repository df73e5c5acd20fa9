"""Where a prompt parts from what is remembered, and from what: tokens only."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from agent_memory.block import HASH_BYTES, Block, BlockHash, Loss, chain, token_bytes
from agent_memory.engine import witness
from agent_memory.engine.witness import SHOWN_TOKENS, Witness
from agent_memory.kvcache.block_pool import BlockPool
from agent_memory.metrics import Metrics
from agent_memory.request import Compared, Finding
from agent_memory.store.block_store import BlockStore
from agent_memory.store.state_dir import StateDir

OURS, THEIRS = BlockHash(b"o" * HASH_BYTES), BlockHash(b"t" * HASH_BYTES)
BASE = [7 * i % 1999 for i in range(1000)]


class Case:
    """A store that knows heads, a pool that holds what is present."""

    def __init__(self, folder: Path) -> None:
        self._dir = StateDir.open(folder)
        self.store = BlockStore.open(self._dir, Metrics())
        self.pool = BlockPool(1 << 20)
        self.witness = Witness(OURS, self.pool, self.store)

    def close(self) -> None:
        self.witness.check()
        self.store.close(10)
        self._dir.close()

    def said(self, agent: str, tokens: list[int], fingerprint: BlockHash = OURS) -> list[Block]:
        blocks = chain(fingerprint, tokens)
        self.store.agents.record(agent, fingerprint, tuple(blocks), 0.0)
        return blocks

    def compared(self, agent: str | None, tokens: list[int], present: list[Block]) -> Compared:
        """`present`: blocks that matched, as far as `tokens` go."""
        data = token_bytes(tokens[:-1])
        matched = sum(_shared(block, data[1024 * i :]) for i, block in enumerate(present))
        return self.witness.compare(agent, OURS, data, matched, present)


def _shared(block: Block, data: bytes) -> int:
    n = min(len(block.tokens), len(data)) // 4
    one, other = np.frombuffer(block.tokens, "<i4", n), np.frombuffer(data, "<i4", n)
    return int(np.argmax(one != other)) if (one != other).any() else n


@pytest.fixture
def case(tmp_path: Path) -> Iterator[Case]:
    case = Case(tmp_path / "state")
    yield case
    case.close()


def test_nothing_is_known(case: Case) -> None:
    assert case.compared("ann", BASE, []) == Compared(0, Finding.NOTHING)
    assert case.compared(None, BASE, []) == Compared(0, Finding.NOTHING)


def test_all_but_the_last_token_is_there(case: Case) -> None:
    blocks = case.said("ann", BASE)
    assert case.compared("ann", BASE, blocks) == Compared(999, Finding.WHOLE)
    assert case.compared("ann", BASE[:600], blocks[:3]) == Compared(599, Finding.WHOLE)


def test_what_goes_on_parts_from_nothing(case: Case) -> None:
    blocks = case.said("ann", BASE)
    assert case.compared("ann", [*BASE, 3, 4, 5], blocks) == Compared(1000, Finding.WHOLE)


@pytest.mark.parametrize("at", [0, 1, 255, 256, 257, 700, 998])
def test_the_agent_said_something_else(case: Case, at: int) -> None:
    blocks = case.said("ann", BASE)
    other = [*BASE[:at], 3, *BASE[at + 1 :]]
    compared = case.compared("ann", other, blocks[: -(-at // 256)])
    assert compared == Compared(at, Finding.OWN, token_bytes(BASE[at:]))


def test_of_several_heads_the_closest_counts(case: Case) -> None:
    far, near = [*BASE[:300], 4, *BASE[301:]], [*BASE[:600], 4, *BASE[601:]]
    case.said("ann", far)
    blocks = case.said("ann", near)
    case.said("ann", [5, *BASE])
    compared = case.compared("ann", BASE, blocks[:3])
    assert compared == Compared(600, Finding.OWN, token_bytes(near[600:]))


def test_no_more_is_handed_on_than_is_shown(case: Case) -> None:
    long = [7 * i % 1999 for i in range(3 * SHOWN_TOKENS)]
    case.said("ann", long)
    compared = case.compared("ann", [3, 4, 5], [])
    assert compared.remembered == token_bytes(long[:SHOWN_TOKENS])


def test_blocks_that_the_head_has_and_nobody_else(case: Case) -> None:
    blocks = case.said("ann", BASE)
    assert case.compared("ann", BASE, blocks[:2]) == Compared(512, Finding.LOST, loss=Loss.EVICTED)
    case.store.gone.note(blocks[2], Loss.DAMAGED)
    assert case.compared("ann", BASE, blocks[:2]).loss is Loss.DAMAGED
    assert case.compared("ann", BASE, []).loss is Loss.EVICTED


@pytest.mark.parametrize("agent", ["ann", None])
def test_blocks_that_are_known_to_be_gone(case: Case, agent: str | None) -> None:
    blocks = chain(OURS, BASE)
    for block in blocks:
        case.store.gone.note(block, Loss.EXPIRED)
    for present in range(4):
        compared = case.compared(agent, [*BASE, 1], blocks[:present])
        assert compared == Compared(256 * present, Finding.LOST, loss=Loss.EXPIRED)
    assert case.compared(agent, [*BASE[:900], 3, 4, 5], blocks[:3]).finding is not Finding.LOST


def test_blocks_of_the_last_turn_of_which_no_head_is_left(case: Case) -> None:
    blocks = chain(OURS, BASE)
    case.witness.saw("ann", blocks)
    for present in range(4):
        compared = case.compared("ann", [*BASE, 1], blocks[:present])
        assert compared == Compared(256 * present, Finding.LOST, loss=Loss.EVICTED)
    assert case.compared("ben", [*BASE, 1], []) == Compared(0, Finding.NOTHING)
    case.witness.forget("ann")
    assert case.compared("ann", [*BASE, 1], []) == Compared(0, Finding.NOTHING)


def test_another_model(case: Case) -> None:
    case.said("ann", BASE, THEIRS)
    assert case.compared("ann", [3, 4], []) == Compared(0, Finding.OTHER_MODEL)
    assert case.compared("ben", BASE, []).finding is Finding.NOTHING
    blocks = case.said("ann", BASE[:500])
    assert case.compared("ann", BASE, blocks) == Compared(500, Finding.OTHER_MODEL)
    assert case.compared("ann", BASE[:510], blocks) == Compared(500, Finding.WHOLE)


def test_what_others_said(case: Case) -> None:
    blocks = chain(OURS, BASE)
    for block in blocks:
        case.pool.put(block, np.zeros(8, np.uint8))
    other = [*BASE[:700], 3, 4, 5]
    compared = case.compared("ann", other, blocks[:3])
    assert compared == Compared(700, Finding.OTHERS, token_bytes(BASE[700:]))
    at_the_edge = case.compared(None, [*BASE[:512], 3, 4, 5], blocks[:2])
    assert at_the_edge == Compared(512, Finding.OTHERS, token_bytes(BASE[512:]))
    assert case.compared(None, [3, 4, 5], []) == Compared(0, Finding.OTHERS, token_bytes(BASE))
    assert case.compared("ann", [*BASE, 3, 4], blocks) == Compared(1000, Finding.WHOLE)


def test_a_rewound_head_ends_where_it_was_rewound_to(case: Case) -> None:
    blocks = case.said("ann", BASE)
    case.store.agents.rewind("ann", 900, None, 0.0)
    compared = case.compared("ann", [*BASE[:900], 3, 4, 5], blocks)
    assert compared == Compared(900, Finding.WHOLE)
    compared = case.compared("ann", [*BASE[:850], 3, 4, 5], blocks)
    assert compared == Compared(850, Finding.OWN, token_bytes(BASE[850:900]))


def test_names_are_bounded(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(witness, "MAX_NAMES", 9)
    blocks = chain(OURS, BASE)
    for agent in ("ann", "ben", "cyd", "ann"):
        case.witness.saw(agent, blocks)
        case.witness.check()
    assert case.compared("ann", [*BASE, 1], []).finding is Finding.LOST
    assert case.compared("ben", [*BASE, 1], []).finding is Finding.NOTHING
