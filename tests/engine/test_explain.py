"""The likely cause of a miss, by name: seeded in the real engine, and alone."""

import random
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import pytest

from agent_memory import failpoint
from agent_memory.block import Loss, common_tokens, token_bytes
from agent_memory.engine.engine import Engine
from agent_memory.engine.explain import BEFORE, Asked, Cause, cause_of
from agent_memory.engine.witness import SHOWN_TOKENS
from agent_memory.model.tokenizer import ChatTokenizer
from agent_memory.request import Compared, Conversation, Finding
from tests.conftest import builtin_model, ordinary_text
from tests.engine.talks import TALKS, TOOLS, Talk, tool
from tests.engine.test_engine import ask, running

talks = pytest.mark.parametrize("talk", TALKS, ids=lambda talk: talk.name)


async def cause(engine: Engine, talk: Talk, text: str, agent: str = "ann") -> Cause:
    tokens = engine.models.default.tokenizer.encode(text)
    return await cause_of_tokens(engine, talk, tuple(tokens), agent)


async def cause_of_tokens(
    engine: Engine, talk: Talk, tokens: tuple[int, ...], agent: str = "ann"
) -> Cause:
    answer = await ask(engine, tokens, agent, max_tokens=1)
    asked = Asked(agent, tokens, Conversation(talk.messages, talk.tools))
    return cause_of(asked, answer.started.compared, engine.models.default.tokenizer)


# ── seeded: nine causes in three conversations ───────────────────────────────────────────────


async def never_seen(engine: Engine, talk: Talk) -> Cause:
    other = TALKS[TALKS.index(talk) - 1]
    await cause(engine, other, other.answered(), "ben")
    return await cause(engine, talk, talk.second())


async def date_or_counter_changed(engine: Engine, talk: Talk) -> Cause:
    await cause(engine, talk, talk.answered())
    later = talk.but(system=talk.later_system)
    return await cause(engine, later, later.second())


async def tools_reordered(engine: Engine, talk: Talk) -> Cause:
    await cause(engine, talk, talk.answered())
    turned = talk.but(tools=[talk.tools[0], *reversed(talk.tools[1:])])
    return await cause(engine, turned, turned.second())


async def reasoning_dropped(engine: Engine, talk: Talk) -> Cause:
    await cause(engine, talk, talk.answered())
    return await cause(engine, talk, talk.second(talk.dropped))


async def reply_tokenized_differently(engine: Engine, talk: Talk) -> Cause:
    """The model wrote its reply letter by letter."""
    encode = engine.models.default.tokenizer.encode
    letters = [token for letter in talk.reply for token in encode(letter)]
    await cause_of_tokens(engine, talk, (*encode(talk.first()), *letters))
    return await cause(engine, talk, talk.second(""))


async def evicted(engine: Engine, talk: Talk) -> Cause:
    await cause(engine, talk, talk.answered())
    await lose(engine, Loss.EVICTED)
    return await cause(engine, talk, talk.second())


async def expired(engine: Engine, talk: Talk) -> Cause:
    await cause(engine, talk, talk.answered())
    await lose(engine, Loss.EXPIRED)
    return await cause(engine, talk, talk.second())


async def lose(engine: Engine, loss: Loss) -> None:
    """Every block but the first, from RAM and disk, as the store loses them."""
    store = engine._store
    await engine._on_thread(lambda: None)  # an answer is told first and remembered then
    assert store.flush(10)
    agent = store.agents.get("ann")
    assert agent is not None
    for block in agent.heads[0].chain[1:]:
        store.gone.note(block, loss)
        store._catalog.forget(block.hash)
        await engine._on_thread(partial(engine._residents.pool.drop, block.hash))


SEEDED: list[Callable[[Engine, Talk], Awaitable[Cause]]] = [
    never_seen,
    date_or_counter_changed,
    tools_reordered,
    reasoning_dropped,
    reply_tokenized_differently,
    evicted,
    expired,
]


@pytest.mark.parametrize("seed", SEEDED, ids=lambda seed: seed.__name__)
async def test_a_seeded_cause_is_named(
    seed: Callable[[Engine, Talk], Awaitable[Cause]], tmp_path: Path
) -> None:
    async with running(tmp_path) as engine:
        for talk in TALKS:
            assert str(await seed(engine, talk)) == seed.__name__, talk.name
            for agent in engine.agents.all(None):
                await engine.agents.remove(agent.id)


async def test_other_model(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        for talk in TALKS:
            await cause(engine, talk, talk.answered(), talk.name)
    async with running(tmp_path, kv_bits=8) as engine:
        for talk in TALKS:
            assert await cause(engine, talk, talk.second(), talk.name) is Cause.OTHER_MODEL
            assert await cause(engine, talk, talk.second(), talk.name) is Cause.NONE


async def test_damaged_file(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        for talk in TALKS:
            await cause(engine, talk, talk.answered(), talk.name)
    for file in (tmp_path / "state" / "blocks").rglob("*.safetensors"):
        raw = bytearray(file.read_bytes())
        raw[-100] ^= 1
        file.write_bytes(raw)
    async with running(tmp_path) as engine:
        for talk in TALKS:
            assert await cause(engine, talk, talk.second(), talk.name) is Cause.DAMAGED_FILE
            assert await cause(engine, talk, talk.second(), talk.name) is Cause.NONE


async def test_no_memory_to_restore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = TALKS[0]
    async with running(tmp_path) as engine:
        await cause(engine, talk, talk.answered())
        monkeypatch.setenv(failpoint.VARIABLE, "restore.grow")
        assert await cause(engine, talk, talk.second()) is Cause.EVICTED
        monkeypatch.delenv(failpoint.VARIABLE)
        assert await cause(engine, talk, talk.second()) is Cause.NONE


async def test_no_room_to_keep(tmp_path: Path) -> None:
    talk = TALKS[0]
    async with running(tmp_path, pool_bytes=1 << 20) as engine:
        assert await cause(engine, talk, talk.answered()) is Cause.NEVER_SEEN
        assert await cause(engine, talk, talk.second()) is Cause.EVICTED


async def test_what_goes_on_is_no_miss(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        for talk in TALKS:
            assert await cause(engine, talk, talk.answered(), talk.name) is Cause.NEVER_SEEN
            assert await cause(engine, talk, talk.answered(), talk.name) is Cause.NONE
            assert await cause(engine, talk, talk.second(), talk.name) is Cause.NONE
            assert await cause(engine, talk, talk.first(), talk.name) is Cause.NONE
            assert await cause(engine, talk, talk.second(), "ben") is Cause.NONE


# ── other differences, and what they could be taken for ──────────────────────────────────────


def named(before: str, now: str, asked_by: Talk, finding: Finding = Finding.OWN) -> Cause:
    """The cause when `before` is remembered and `now` is asked."""
    tokenizer = builtin_model(8).tokenizer
    remembered, tokens = tokenizer.encode(before), tokenizer.encode(now)
    at = common_tokens(token_bytes(remembered), token_bytes(tokens))
    compared = Compared(at, finding, token_bytes(remembered[at : at + SHOWN_TOKENS]))
    agent = "ann" if finding is Finding.OWN else None
    return cause_of(
        Asked(agent, tokens, Conversation(asked_by.messages, asked_by.tools)), compared, tokenizer
    )


LATER = {
    "coder": TALKS[0].later_system.replace("folder", "directory"),
    "diarist": TALKS[1].later_system.replace("kindly", "kindly and at length"),
    "runner": TALKS[2].later_system.replace("the plan", "that plan"),
}


def changed(talk: Talk) -> dict[str, Talk]:
    listing = tool("list", "List a folder.")
    return {
        "a word of the system prompt": talk.but(system=talk.system.replace("e", "a", 1)),
        "a date and a word": talk.but(system=LATER[talk.name]),
        "the question": talk.but(user=talk.user.replace("?", " now?").replace("Rena", "Remo")),
        "a number in the question": talk.but(user=talk.user + " 12"),
        "the answer": talk.but(reply=talk.reply + " Or so."),
        "another thought": talk.but(thought=talk.thought.replace("\nT", "\nA").replace("N", "W")),
        "a tool before": talk.but(tools=[listing, *talk.tools]),
        "a tool between": talk.but(tools=[*talk.tools[:2], listing, *talk.tools[2:]]),
        "a tool less": talk.but(tools=[talk.tools[0], *talk.tools[2:]]),
        "a tool's words": talk.but(tools=[tool("read", "Reads."), *talk.tools[1:]]),
    }


@talks
@pytest.mark.parametrize("what", changed(TALKS[0]))
def test_another_text_is_just_that(talk: Talk, what: str) -> None:
    other = changed(talk)[what]
    assert named(talk.answered(), other.second(), other) is Cause.PROMPT_CHANGED


def test_a_slip_of_the_pen_is_no_other_spelling() -> None:
    """One letter more, less or another; around it words fall into other tokens."""
    rng, pages, talk = random.Random(3), ordinary_text(), TALKS[0].but(show_tools=lambda _: "")
    for n in range(200):
        start, at = rng.randrange(len(pages) - 300), rng.randrange(20, 280)
        text, letter = pages[start : start + 300], rng.choice("aeioustx ")
        changes = (letter + text[at + 1 :], letter + text[at:], text[at + 1 :])
        other = text[:at] + changes[n % 3]
        if other != text:
            one, two = talk.but(user=text), talk.but(user=other)
            assert named(one.answered(), two.second(), two) is Cause.PROMPT_CHANGED, (text, other)


@talks
def test_a_number_in_a_message_of_the_user_is_no_counter(talk: Talk) -> None:
    one, other = (talk.but(user=f"What is 17 and {n}?\n{talk.user}") for n in (4, 25))
    assert named(one.answered(), other.second(), other) is Cause.PROMPT_CHANGED


@talks
def test_tools_named_in_talk_are_not_reordered(talk: Talk) -> None:
    one = talk.but(user='First "name": "read", then "name": "write".')
    other = talk.but(user='First "name": "write", then "name": "read".')
    assert named(one.answered(), other.second(), other) is Cause.PROMPT_CHANGED


def test_a_long_prompt_with_tools_is_read_near_the_parting_only() -> None:
    """On the event loop: to decode all of it and look for each tool there took two seconds."""
    real, read = builtin_model(None).tokenizer, list[int]()

    class Counting:
        special = real.special

        def decode(self, tokens: Sequence[int]) -> str:
            read.append(len(tokens))
            return real.decode(tokens)

    tokens = tuple(real.encode(ordinary_text()[:100_000]))
    said = Conversation([{"role": "user", "content": "Go on."}], TOOLS)
    remembered = token_bytes(tokens[:SHOWN_TOKENS])
    compared = Compared(len(tokens) - 2000, Finding.OWN, remembered)
    tokenizer = cast(ChatTokenizer, Counting())
    assert cause_of(Asked("ann", tokens, said), compared, tokenizer) is Cause.PROMPT_CHANGED
    assert max(read) <= BEFORE + SHOWN_TOKENS < len(tokens) // 2


@talks
def test_strangers_that_begin_alike_have_not_been_seen(talk: Talk) -> None:
    other = talk.but(system="You are a cook.", user="What is for lunch?")
    assert named(talk.answered(), other.second(), other, Finding.OTHERS) is Cause.NEVER_SEEN
    again = talk.but(reply="No.")
    assert named(talk.answered(), again.second(), again, Finding.OTHERS) is Cause.PROMPT_CHANGED


@talks
def test_an_agent_that_begins_anew_has_not_been_seen(talk: Talk) -> None:
    other = talk.but(system="Cook for us.", user="Pie?", thought="", reply="Yes.", tools=[])
    other = other.but(show_tools=lambda tools: "")
    assert named(talk.answered(), other.second(), other) is Cause.NEVER_SEEN


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("Now: 9:59", "Now: 10:00"),
        ("Day 9", "Day 99"),
        ("Day 99 of it", "Day 9 of it"),
        ("on May 31st", "on June 1st"),
        ("It is Monday morning.", "It is Tuesday evening."),
        ("id 7f3a-22c1: go", "id 9b01-0001: go"),
        ("2026-11-20T09:59:00Z", "2026-12-01T10:00:07+01:00"),
    ],
)
def test_dates_and_counters_of_many_kinds(before: str, now: str) -> None:
    one, other = (TALKS[0].but(system=f"You help. {text} Be short.") for text in (before, now))
    assert named(one.answered(), other.second(), other) is Cause.DATE_OR_COUNTER_CHANGED
    one, other = (TALKS[0].but(system=f"You help. {text}") for text in (before, now))
    assert named(one.answered(), other.second(), other) is Cause.DATE_OR_COUNTER_CHANGED


@pytest.mark.parametrize("loss", Loss)
def test_every_loss_has_a_cause(loss: Loss) -> None:
    asked = Asked("ann", [1, 2, 3], Conversation([]))
    compared = Compared(1, Finding.LOST, loss=loss)
    assert cause_of(asked, compared, builtin_model(8).tokenizer) in (
        Cause.EVICTED,
        Cause.EXPIRED,
        Cause.DAMAGED_FILE,
    )


def test_a_scored_prompt_is_computed_for_that_and_nothing_else() -> None:
    asked = Asked("ann", list(range(50)), Conversation([]))
    compared = Compared(0, Finding.NOT_LOOKED)
    assert cause_of(asked, compared, builtin_model(8).tokenizer) is Cause.PROMPT_SCORED


def test_odd_tokens_have_some_cause() -> None:
    """Halves of characters, nothing at all before or after: whatever, but no failure."""
    rng, tokenizer = random.Random(5), builtin_model(8).tokenizer
    for _ in range(300):
        tokens = [rng.randrange(2048) for _ in range(rng.randrange(1, 40))]
        other = [rng.randrange(2048) for _ in range(rng.randrange(1, 40))]
        compared = Compared(rng.randrange(len(tokens)), Finding.OWN, token_bytes(other))
        for said in ([], TALKS[0].messages):
            assert (
                cause_of(Asked("a", tokens, Conversation(said, TOOLS)), compared, tokenizer)
                in Cause
            )


@pytest.mark.parametrize(
    ("position", "went_back", "cause"),
    [
        (99, 0, Cause.NONE),
        (99, 8, Cause.BACK_TO_CHECKPOINT),
        (60, 39, Cause.PROMPT_CHANGED),
        (60, 41, Cause.BACK_TO_CHECKPOINT),
    ],
)
def test_going_back_is_the_cause_where_it_costs_most(
    position: int, went_back: int, cause: Cause
) -> None:
    tokenizer = builtin_model(8).tokenizer
    tokens = (tokenizer.encode("Tell me of the sea and its ships. " * 20))[:100]
    finding = Finding.WHOLE if position == 99 else Finding.OWN
    compared = Compared(position, finding, token_bytes([7] * 20), went_back=went_back)
    asked = Asked(
        "ann", tokens, Conversation([{"role": "user", "content": tokenizer.decode(tokens)}])
    )
    assert cause_of(asked, compared, tokenizer) is cause
