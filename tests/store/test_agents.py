"""Heads: what continues what, exact to the token."""

import random
from contextlib import suppress

import pytest

from agent_memory.block import BLOCK_TOKENS, Block, BlockHash, chain
from agent_memory.errors import Conflict, NotFound
from agent_memory.store.agents import MAX_HEADS, Agents, Changed
from agent_memory.store.heads import Head, Turn, num_tokens, shared_tokens

ROOT, OTHER = BlockHash(bytes(32)), BlockHash(bytes([1]) * 32)
N = BLOCK_TOKENS


def spell(text: str, root: BlockHash = ROOT) -> tuple[Block, ...]:
    """Upper case is a full block of that token, lower case one token: "Aab" is A, then two."""
    tokens: list[int] = []
    for letter in text:
        tokens += [ord(letter)] * (N if letter.isupper() else 1)
    return tuple(chain(root, tokens))


def checkpoint_at(conversation: tuple[Block, ...], end: int) -> Block:
    block = conversation[end // N] if end % N else conversation[end // N - 1]
    if end % N:
        return Block.checkpoint_after(block.parent, block.tokens[: 4 * (end % N)])
    return Block.checkpoint_after(block.hash, b"")


def heads(agents: Agents, agent_id: str = "a") -> list[tuple[Block, ...]]:
    agent = agents.get(agent_id)
    return [head.chain for head in agent.heads] if agent else []


def record(agents: Agents, agent_id: str, text: str, turn: Turn | None = None) -> set[BlockHash]:
    """-> blocks that nobody owns any more."""
    changed = agents.record(agent_id, ROOT, spell(text), 0.0, turn)
    agents.check()
    return free(agents, changed)


def free(agents: Agents, changed: Changed) -> set[BlockHash]:
    return {block.hash for c in changed.loose for block in c if not agents.owns(block.hash)}


def last(*texts: str) -> set[BlockHash]:
    return {spell(text)[-1].hash for text in texts}


@pytest.mark.parametrize(
    ("recorded", "left", "freed"),
    [
        # chains recorded in order        heads, newest first   ends freed by the last
        (["a"], ["a"], []),
        (["a", "a"], ["a"], []),
        (["a", "ab"], ["ab"], ["a"]),
        (["ab", "a"], ["ab"], ["a"]),
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
def test_the_rules(recorded: list[str], left: list[str], freed: list[str]) -> None:
    agents = Agents()
    freed_last = [record(agents, "a", text) for text in recorded][-1]
    assert heads(agents) == [spell(text) for text in left]
    assert freed_last == last(*freed)


def test_a_partial_block_filled_up_is_freed() -> None:
    agents = Agents()
    half = tuple(chain(ROOT, [7] * 100))
    agents.record("a", ROOT, half, 0.0)
    changed = agents.record("a", ROOT, tuple(chain(ROOT, [7] * 300)), 0.0)
    assert free(agents, changed) == {half[0].hash}


def test_what_is_shared_is_exact_to_the_token() -> None:
    long = chain(ROOT, range(700))
    for n in (1, 255, 256, 257, 512, 699, 700):
        assert shared_tokens(chain(ROOT, range(n)), long) == n
        assert shared_tokens(long, chain(ROOT, [*range(n - 1), 9999])) == n - 1
        assert shared_tokens(chain(OTHER, range(n)), long) == 0
    assert shared_tokens(chain(ROOT, range(701)), long) == 700
    assert shared_tokens([], long) == 0


def test_a_tail_another_head_ends_with_is_owned() -> None:
    agents = Agents()
    record(agents, "a", "Ax")
    record(agents, "b", "Ax")
    assert record(agents, "a", "Axy") == set()
    assert record(agents, "b", "Axz") == last("Ax")


def test_eight_heads_and_the_oldest_goes() -> None:
    agents = Agents()
    for n in range(MAX_HEADS):
        record(agents, "a", "A" + chr(97 + n))
    assert record(agents, "a", "Az") == last("Aa")
    assert heads(agents) == [spell("A" + letter) for letter in "zhgfedcb"]


def test_heads_of_another_model_are_another_matter() -> None:
    agents = Agents()
    for n in range(MAX_HEADS):
        record(agents, "a", "A" + chr(97 + n))
    agents.record("a", OTHER, spell("A", OTHER), 0.0)
    assert len(heads(agents)) == MAX_HEADS + 1
    assert heads(agents)[0] == spell("A", OTHER)
    agents.check()


def the_head(agents: Agents, agent_id: str = "a") -> Head:
    return agents.known(agent_id).heads[0]


def test_turns_go_on_where_the_conversation_does() -> None:
    agents = Agents()
    record(agents, "a", "Aab", (N, N + 2))
    assert the_head(agents).turns == ((N, N + 2),)
    record(agents, "a", "Aabcde", (N + 3, N + 5))
    assert the_head(agents).turns == ((N, N + 2), (N + 3, N + 5))
    record(agents, "a", "Aabcdxy", (N + 5, N + 6))  # the last answer came back changed
    assert the_head(agents).turns == ((N, N + 2), (N + 5, N + 6))
    record(agents, "a", "Aabcd")  # used again: nothing new
    assert the_head(agents).turns == ((N, N + 2), (N + 5, N + 6))
    record(agents, "a", "Bb", (N, N + 1))
    assert the_head(agents).turns == ((N, N + 1),)


@pytest.mark.parametrize("turn", [(N + 1, N + 3), (N + 2, N + 1), (0, 0)])
def test_what_does_not_lie_in_the_head_is_no_turn(turn: Turn) -> None:
    agents = Agents()
    record(agents, "a", "Aab", turn)
    assert the_head(agents).turns == ()


def test_a_heads_id_stays_while_the_conversation_goes_on() -> None:
    agents = Agents()
    record(agents, "a", "Aa")
    head_id = the_head(agents).id
    for text in ("Aab", "Ab", "Aabc", "Aa"):
        record(agents, "a", text)
    assert [head.id == head_id for head in agents.known("a").heads] == [True, False]
    agents.rewind("a", 2, None, 0.0)
    assert the_head(agents).id == head_id


def test_a_rewound_head_uses_part_of_its_last_block() -> None:
    agents = Agents()
    record(agents, "a", "Aab", (N, N + 2))
    record(agents, "a", "AabBCd", (N + 3, 3 * N + 3))
    before = spell("AabBCd")
    changed = agents.rewind("a", 2 * N + 1, None, 0.0)
    agents.check()
    head = the_head(agents)
    assert (head.num_tokens, head.chain, head.turns) == (2 * N + 1, before[:3], ((N, N + 2),))
    assert free(agents, changed) == {before[3].hash}


def test_going_on_from_a_rewound_head_replaces_it() -> None:
    agents = Agents()
    record(agents, "a", "AB")
    agents.rewind("a", N + 5, None, 0.0)
    tokens = [ord("A")] * N + [ord("B")] * 5 + [1, 2, 3]
    changed = agents.record("a", ROOT, tuple(chain(ROOT, tokens)), 0.0)
    agents.check()
    assert heads(agents) == [tuple(chain(ROOT, tokens))]
    assert free(agents, changed) == last("AB")


def test_a_rewound_head_stays_beside_an_older_one_that_goes_further() -> None:
    agents = Agents()
    record(agents, "a", "ABx")
    record(agents, "a", "ABy")
    agents.rewind("a", 2 * N, None, 0.0)
    agents.check()
    assert heads(agents) == [spell("AB"), spell("ABx")]
    assert the_head(agents).num_tokens == 2 * N
    record(agents, "a", "ABxz")
    assert heads(agents) == [spell("ABxz")]


@pytest.mark.parametrize("num_tokens", [0, -1, N + 2])
def test_no_head_is_rewound_beyond_its_end(num_tokens: int) -> None:
    agents = Agents()
    record(agents, "a", "Aa")
    with pytest.raises(Conflict, match="has 257 tokens"):
        agents.rewind("a", num_tokens, None, 0.0)
    assert heads(agents) == [spell("Aa")]


def test_a_fork_owns_what_it_was_made_from() -> None:
    agents = Agents()
    record(agents, "a", "AB", (N, 2 * N))
    record(agents, "a", "Ax")
    older = agents.known("a").heads[1]
    agents.fork("a", "b", None, 1.0)
    agents.fork("a", "c", older.id, 1.0)
    agents.check()
    assert heads(agents, "b") == [spell("Ax")] and heads(agents, "c") == [spell("AB")]
    assert the_head(agents, "c").turns == ((N, 2 * N),)
    assert the_head(agents, "c").id != older.id
    assert free(agents, agents.remove("a")) == set()
    assert free(agents, agents.remove("c")) == last("AB")
    agents.check()
    assert [agent.id for agent in agents.all()] == ["b"]


def test_names_that_are_taken_or_unknown_are_refused() -> None:
    agents = Agents()
    record(agents, "a", "A")
    with pytest.raises(Conflict, match="'a' already"):
        agents.fork("a", "a", None, 0.0)
    with pytest.raises(NotFound, match="no head 'x'. It has '1'"):
        agents.fork("a", "b", "x", 0.0)
    with pytest.raises(NotFound, match="no head '7'"):
        agents.rewind("a", 1, "7", 0.0)
    unknown = pytest.raises(NotFound, match="Nothing is remembered of an agent 'b'")
    with unknown:
        agents.fork("b", "c", None, 0.0)
    with unknown:
        agents.rewind("b", 1, None, 0.0)
    with unknown:
        agents.set_pinned("b", True)
    with unknown:
        agents.remove("b")
    assert [agent.id for agent in agents.all()] == ["a"]


def test_facts_stay_with_the_agent_while_its_heads_change() -> None:
    agents = Agents()
    agents.credit("a", 5)
    record(agents, "a", "A")
    agents.credit("a", 7)
    agents.set_pinned("a", True)
    record(agents, "a", "AB")
    agents.rewind("a", 3, None, 0.0)
    assert (agents.known("a").pinned, agents.known("a").bytes_written) == (True, 12)
    agents.remove("a")
    record(agents, "a", "A")
    assert (agents.known("a").pinned, agents.known("a").bytes_written) == (False, 0)


def test_an_adopted_head_has_its_turns_and_its_end() -> None:
    agents = Agents()
    turns = [(5, 9), (N + 2, N + 3), (N + 4, N + 9)]
    changed = agents.adopt("a", ROOT, spell("Aabcdefgh"), 0.0, turns, N + 3)
    agents.check()
    assert (changed.agent.heads[0].num_tokens, the_head(agents).turns) == (N + 3, tuple(turns[:2]))


def test_agents_are_listed_by_last_use_and_case_counts() -> None:
    agents = Agents()
    for n, agent_id in enumerate(["a", "A", "b", "a"]):
        agents.record(agent_id, ROOT, spell("Ab"), float(n))
    assert [agent.id for agent in agents.all()] == ["a", "b", "A"]
    assert [agent.last_used for agent in agents.all()] == [3.0, 2.0, 1.0]
    assert agents.get("B") is None
    first = agents.all()[0].heads[0]
    assert first.num_tokens == N + 1


def test_random_lives_keep_the_rules() -> None:
    rng = random.Random(3)
    agents = Agents()
    for _ in range(1500):
        text = "".join(rng.choice("AAb") for _ in range(rng.randrange(1, 4)))
        conversation = spell(text + rng.choice("abcd"))
        agent_id = rng.choice("xyz")
        known = agents.get(agent_id)
        match rng.randrange(8) if known else 7:
            case 0:
                agents.remove(agent_id)
            case 1 | 2 if known:
                head = rng.choice(known.heads)
                agents.rewind(agent_id, rng.randrange(1, head.num_tokens + 1), head.id, 0.0)
            case 3:
                with suppress(Conflict):
                    agents.fork(agent_id, rng.choice("xyz"), None, 0.0)
            case _:
                ends = rng.choices(range(1, num_tokens(conversation) + 1), k=3)
                own = tuple(checkpoint_at(conversation, end) for end in ends)
                turn = rng.randrange(600), N
                changed = agents.record(agent_id, ROOT, conversation, 0.0, turn, own)
                assert set(own) <= set(changed.agent.heads[0].checkpoints)
                head = the_head(agents, agent_id)
                assert min(shared_tokens(conversation, head.chain), head.num_tokens) == num_tokens(
                    conversation
                )
        agents.check()
