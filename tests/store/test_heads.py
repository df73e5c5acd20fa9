"""Which checkpoints a head has, and which are nobody's any more."""

from collections.abc import Sequence

from agent_memory.block import BLOCK_TOKENS, Block, BlockHash, chain, token_bytes
from agent_memory.store.agents import Agents, Changed, Rank

ROOT = BlockHash(bytes(32))
N = BLOCK_TOKENS
TOKENS = range(600)
ENDS = (100, N, 300, 2 * N, 600)


def at(tokens: Sequence[int], *ends: int) -> tuple[Block, ...]:
    """Checkpoints of the first so many of these tokens."""
    blocks = chain(ROOT, tokens)
    parents = [ROOT, *(block.hash for block in blocks)]
    return tuple(
        Block.checkpoint_after(parents[end // N], token_bytes(tokens[end // N * N : end]))
        for end in ends
    )


def record(agents: Agents, tokens: Sequence[int], *checkpoints: Block) -> Changed:
    changed = agents.record("a", ROOT, tuple(chain(ROOT, tokens)), 0.0, None, checkpoints)
    agents.check()
    return changed


def own(agents: Agents, agent_id: str = "a") -> tuple[Block, ...]:
    return agents.known(agent_id).heads[0].checkpoints


def loose(changed: Changed) -> set[Block]:
    """Checkpoints that are nobody's.  They come before chains, each by itself."""
    kinds = [piece[0].is_checkpoint for piece in changed.loose]
    assert kinds == sorted(kinds, reverse=True)
    single = [piece for piece in changed.loose if piece[0].is_checkpoint]
    assert all(len(piece) == 1 for piece in single)
    return {piece[0] for piece in single}


def test_a_head_has_just_the_checkpoints_given_that_lie_in_it() -> None:
    agents, all_of_them = Agents(), at(TOKENS, *ENDS)
    other = [*range(200), 7, *range(201, 600)]
    strange = at(other, 150, 201, 2 * N)  # the first is the same in both
    late = at(range(601), 601)
    changed = record(agents, TOKENS, *reversed(all_of_them), *strange, *late)
    assert own(agents) == tuple(sorted({*all_of_them, strange[0]}, key=position))
    assert loose(changed) == {*strange[1:], *late}
    changed = record(agents, range(700), *all_of_them[1:3])
    assert own(agents) == all_of_them[1:3]
    assert loose(changed) == {all_of_them[0], *all_of_them[3:], strange[0]}


def position(checkpoint: Block) -> int:
    """Of one of TOKENS."""
    first = [ROOT, *(block.hash for block in chain(ROOT, TOKENS))].index(checkpoint.parent)
    return first * N + checkpoint.num_tokens


def test_one_that_goes_further_keeps_its_own_and_gets_the_new() -> None:
    agents, checkpoints = Agents(), at(TOKENS, *ENDS)
    record(agents, TOKENS, checkpoints[0], checkpoints[4])
    changed = record(agents, range(310), *checkpoints[:3])
    head = agents.known("a").heads[0]
    assert (head.num_tokens, head.checkpoints) == (600, (*checkpoints[:3], checkpoints[4]))
    assert loose(changed) == set()


def test_a_rewound_head_keeps_those_it_has_tokens_for() -> None:
    agents, checkpoints = Agents(), at(TOKENS, *ENDS)
    record(agents, TOKENS, *checkpoints)
    for num_tokens, kept in ((512, 4), (511, 3), (300, 3), (299, 2), (256, 2), (99, 0)):
        before = own(agents)
        changed = agents.rewind("a", num_tokens, None, 0.0)
        agents.check()
        assert own(agents) == checkpoints[:kept]
        assert loose(changed) == set(before[kept:])


def test_a_fork_has_them_too_and_they_go_with_the_last_owner() -> None:
    agents, checkpoints = Agents(), at(TOKENS, *ENDS)
    record(agents, TOKENS, *checkpoints)
    agents.fork("a", "b", None, 0.0)
    agents.set_pinned("b", True)
    assert own(agents, "b") == checkpoints
    assert agents.rank(checkpoints[0].hash) is Rank.PINNED
    assert loose(agents.rewind("a", 50, None, 0.0)) == set()
    assert loose(agents.remove("b")) == set(checkpoints)
    agents.check()
    assert not any(agents.owns(checkpoint.hash) for checkpoint in checkpoints)


def test_an_adopted_head_has_those_before_its_end() -> None:
    agents, checkpoints = Agents(), at(TOKENS, *ENDS)
    blocks = tuple(chain(ROOT, TOKENS))
    changed = agents.adopt("a", ROOT, blocks, 0.0, (), 300, checkpoints)
    agents.check()
    assert own(agents) == checkpoints[:3] and loose(changed) == set(checkpoints[3:])


def test_one_that_is_gone_takes_nothing_with_it() -> None:
    agents, checkpoints = Agents(), at(TOKENS, *ENDS)
    record(agents, TOKENS, *checkpoints)
    agents.fork("a", "b", None, 0.0)
    cut = agents.cut(checkpoints[2])
    agents.check()
    assert (cut.agents, cut.loose) == ({"a", "b"}, ())
    left = (*checkpoints[:2], *checkpoints[3:])
    assert own(agents) == own(agents, "b") == left
    assert [a.heads[0].num_tokens for a in agents.all()] == [600, 600]
    assert agents.cut(checkpoints[2]).agents == set()


def test_a_head_that_is_cut_loses_the_later_ones() -> None:
    agents, checkpoints = Agents(), at(TOKENS, *ENDS)
    record(agents, TOKENS, *checkpoints)
    other = [*range(520), 7]
    agents.record("b", ROOT, tuple(chain(ROOT, other)), 0.0, None, checkpoints[3:4])
    demotions = agents.num_demotions
    cut = agents.cut(chain(ROOT, TOKENS)[1])
    agents.check()
    assert (cut.agents, set(cut.loose)) == ({"a", "b"}, {(c,) for c in checkpoints[2:]})
    assert own(agents) == checkpoints[:2] and own(agents, "b") == ()
    assert agents.num_demotions == demotions
    agents.set_pinned("a", True)
    agents.fork("a", "c", None, 0.0)
    assert set(agents.cut(chain(ROOT, TOKENS)[0]).loose) == {(c,) for c in checkpoints[:2]}
    assert agents.num_demotions == demotions + 1
    assert agents.all() == []
    agents.check()
