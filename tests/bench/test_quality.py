"""What is asked and scored for the part `quality`."""

import math
from dataclasses import replace

import pytest

from agent_memory.bench import quality
from agent_memory.bench.quality import Talk
from agent_memory.bench.texts import Pages

SIZES = quality.SIZES["quick"]


def test_the_fact_asked_for_was_told_first() -> None:
    talks = list(quality.conversations(SIZES, Pages().take))
    assert len(talks) == SIZES.questions
    for talk in talks:
        told, *_, asked = [message["content"] for message in talk.messages]
        key = asked.removeprefix("What is the code for ").removesuffix("?")
        assert f"- the code for {key} is {talk.fact}" in told
        assert [m["role"] for m in talk.messages] == ["user", "assistant"] * (SIZES.pages + 1) + [
            "user"
        ]


def test_nobody_is_told_the_same() -> None:
    talks = quality.conversations(replace(quality.SIZES["full"], pages=1), Pages().take)
    told = [talk.messages[0]["content"] for talk in talks]
    assert len(set(told)) == len(told)


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ("The code for orchid is 7319.", True),
        ("7319", True),
        ("It is **7319**!", True),
        ("The code for orchid is 73190.", False),
        ("I do not know.", False),
        ("", False),
    ],
)
def test_an_answer_is_right_if_it_holds_the_fact(answer: str, *, is_right: bool) -> None:
    assert Talk("agent", [], "7319").is_right(answer) == is_right


def test_perplexity_of_even_chances_is_their_number() -> None:
    assert quality.perplexity(10 * math.log(1 / 8), 11) == pytest.approx(8)


def test_passages_are_long_enough_and_differ() -> None:
    for sizes in quality.SIZES.values():
        texts = list(quality.passages(sizes))
        assert len(texts) == len(set(texts)) == sizes.passages
        assert min(map(len, texts)) > 4 * sizes.tokens
