"""Heads: what continues what, exact to the token."""

import random

import pytest

from agent_memory.block import BLOCK_TOKENS, Block, BlockHash, chain
from agent_memory.store.agents import MAX_HEADS, Agents, is_prefix

ROOT, OTHER = BlockHash(bytes(32)), BlockHash(bytes([1]) * 32)
N = BLOCK_TOKENS


def spell(text: str, root: BlockHash = ROOT) -> tuple[Block, ...]:
    """Upper case is a full block of that token, lower case one token: "Aab" is A, then two."""
    tokens: list[int] = []
    for letter in text:
        tokens += [ord(letter)] * (N if letter.isupper() else 1)
    return tuple(chain(root, tokens))


def heads(agents: Agents, agent_id: str = "a") -> list[tuple[Block, ...]]:
    agent = agents.get(agent_id)
    return [head.chain for head in agent.heads] if agent else []


@pytest.mark.parametrize(
    ("recorded", "left", "superseded"),
    [
        # chains recorded in order        heads, newest first   superseded by the last
        (["a"], ["a"], []),
        (["a", "a"], ["a"], []),
        (["a", "ab"], ["ab"], ["a"]),
        (["ab", "a"], ["ab"], []),
        (["a", "b"], ["b", "a"], []),
        (["Aa", "Aab"], ["Aab"], ["Aa"]),
        (["Aa", "Ab"], ["Ab", "Aa"], []),
        (["A", "Aa"], ["Aa"], []),
        (["A", "AB"], ["AB"], []),
        (["Aa", "AB"], ["AB", "Aa"], []),
        (["Ax", "AB", "A"], ["AB", "Ax"], []),
        (["AB", "Ax", "AB"], ["AB", "Ax"], []),
        (["AB", "Ax", "A"], ["Ax", "AB"], []),
        (["Ab", "Ac", "Aba", "Acd"], ["Acd", "Aba"], ["Ac"]),
        (["a", "A"], ["A", "a"], []),
        (["aa", "aab", "aabb"], ["aabb"], ["aab"]),
        (["ABC", "AB", "ABCD"], ["ABCD"], []),
    ],
    ids=lambda value: "-".join(value) or "none",
)
def test_the_rules(recorded: list[str], left: list[str], superseded: list[str]) -> None:
    agents = Agents()
    for text in recorded:
        last = agents.record("a", ROOT, spell(text), 0.0)
        agents.check()
    assert heads(agents) == [spell(text) for text in left]
    assert last.superseded == tuple(spell(text)[-1] for text in superseded)


def test_a_partial_block_filled_up_is_superseded() -> None:
    agents = Agents()
    half = tuple(chain(ROOT, [7] * 100))
    agents.record("a", ROOT, half, 0.0)
    assert agents.record("a", ROOT, tuple(chain(ROOT, [7] * 300)), 0.0).superseded == half


def test_a_prefix_is_exact_to_the_token() -> None:
    long = chain(ROOT, range(700))
    for n in (1, 255, 256, 257, 512, 699, 700):
        assert is_prefix(chain(ROOT, range(n)), long)
        assert not is_prefix(chain(ROOT, [*range(n - 1), 9999]), long)
        assert not is_prefix(chain(OTHER, range(n)), long)
    assert not is_prefix(chain(ROOT, range(701)), long)


def test_a_tail_another_head_ends_with_stays() -> None:
    agents = Agents()
    agents.record("a", ROOT, spell("Ax"), 0.0)
    agents.record("b", ROOT, spell("Ax"), 0.0)
    assert agents.record("a", ROOT, spell("Axy"), 0.0).superseded == ()
    assert agents.record("b", ROOT, spell("Axz"), 0.0).superseded == (spell("Ax")[-1],)


def test_eight_heads_and_the_oldest_goes() -> None:
    agents = Agents()
    for n in range(MAX_HEADS):
        agents.record("a", ROOT, spell("A" + chr(97 + n)), 0.0)
    recorded = agents.record("a", ROOT, spell("Az"), 0.0)
    assert recorded.gone == (1,) and recorded.superseded == ()
    assert heads(agents) == [spell("A" + letter) for letter in "zhgfedcb"]
    agents.check()


def test_heads_of_another_model_are_another_matter() -> None:
    agents = Agents()
    for n in range(MAX_HEADS):
        agents.record("a", ROOT, spell("A" + chr(97 + n)), 0.0)
    agents.record("a", OTHER, spell("A", OTHER), 0.0)
    assert len(heads(agents)) == MAX_HEADS + 1
    assert heads(agents)[0] == spell("A", OTHER)
    agents.check()


def test_agents_are_listed_by_last_use_and_case_counts() -> None:
    agents = Agents()
    for n, agent_id in enumerate(["a", "A", "b", "a"]):
        agents.record(agent_id, ROOT, spell("Ab"), float(n))
    assert [agent.id for agent in agents.all()] == ["a", "b", "A"]
    assert [agent.last_used for agent in agents.all()] == [3.0, 2.0, 1.0]
    assert agents.get("B") is None
    first = agents.all()[0].heads[0]
    assert first.num_tokens == N + 1


def test_random_conversations_keep_the_rules() -> None:
    rng = random.Random(3)
    agents, tails = Agents(), {}
    for _ in range(600):
        text = "".join(rng.choice("AAb") for _ in range(rng.randrange(1, 4)))
        conversation = spell(text + rng.choice("abcd"))
        tails[conversation[-1].hash] = conversation[-1]
        recorded = agents.record(rng.choice("xyz"), ROOT, conversation, 0.0)
        agents.check()
        ends = {head.chain[-1].hash for agent in agents.all() for head in agent.heads}
        assert not ends & {block.hash for block in recorded.superseded}
        assert is_prefix(conversation, recorded.head.chain)
