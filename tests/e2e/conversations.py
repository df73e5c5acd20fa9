"""Varied conversations, and the judge that tells a tie from a fault.

What the conversations are made of, the built-in model knows: facts to remember, text to read,
questions.  Everything follows from the seed.
"""

import random
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from agent_memory import request
from agent_memory.kvcache.sequence_kv import SequenceKV
from agent_memory.model.loader import LoadedModel
from agent_memory.model.runner import Job
from tests.conftest import ordinary_text
from tests.ties import tie_limit

Messages = list[dict[str, str]]
WAYS = ("memory", "sigterm", "kill")
THINGS = ("orchid", "harbor", "falcon", "cedar", "violet", "meadow", "copper", "lantern")
COLORS = ("teal", "amber", "crimson", "indigo", "olive")
ODD = ("naïve café — 日本語のテキスト 🦜", "Ωμέγα ≠ ω; ﷽ 👩‍👩‍👧", "e\u0301 ü ß \u200d end")


@dataclass
class Conversation:
    """`turns` are what the user says; `way` is what happens to the server before the last one.

    `diverges`: the last turn is said in place of the one before, as when a user edits a message.
    """

    name: str
    way: str
    diverges: bool
    turns: list[str]
    messages: Messages = field(default_factory=list)

    def said(self, text: str) -> Messages:
        return [*self.messages, {"role": "user", "content": text}]

    def heard(self, text: str, answer: str) -> None:
        self.messages = [*self.said(text), {"role": "assistant", "content": answer}]

    def last_request(self) -> Messages:
        if self.diverges:
            self.messages = self.messages[:-2]
        return self.said(self.turns[-1])


def conversations(count: int, seed: int) -> list[Conversation]:
    """Ways take turns; every third conversation diverges."""
    rng = random.Random(seed)
    return [
        Conversation(f"talk-{seed}-{i}", WAYS[i % 3], i % 3 == (i // 3) % 3, _turns(rng))
        for i in range(count)
    ]


def _turns(rng: random.Random) -> list[str]:
    thing, color, code = rng.choice(THINGS), rng.choice(COLORS), rng.randrange(1000, 9999)
    facts = (
        f"Remember these facts:\n- the code for {thing} is {code}\n- my favorite color is {color}"
    )
    middle = [_aside(rng) for _ in range(rng.randrange(0, 5))]
    question = rng.choice((f"What is the code for {thing}?", "What is my favorite color?"))
    return [facts, *middle, question] if rng.random() < 0.8 else [facts, *middle, _aside(rng)]


def _aside(rng: random.Random) -> str:
    kind = rng.randrange(4)
    if kind == 0:
        return rng.choice(ODD)
    if kind == 1:
        return "Hello!"
    text = ordinary_text()
    start, length = rng.randrange(len(text) - 5000), rng.randrange(40, 3000)
    return "Read this:\n" + text[start : start + length]


@dataclass(frozen=True)
class Divergence:
    """At which token two answers part, how far apart the two best logits are there, and how far
    apart they may be to count as undecided."""

    position: int
    margin: float
    limit: float

    @property
    def is_tie(self) -> bool:
        return self.margin < self.limit


def judge(loaded: LoadedModel, messages: Messages, one: str, other: str) -> Divergence:
    """Follow the answer that both begin with, up to where they part."""
    prompt = loaded.tokenizer.encode_chat(request.Conversation(messages))
    kv, text, answer, position = SequenceKV(loaded.proven.spec), loaded.tokenizer.stream(), "", 0
    tokens = prompt
    while True:
        logits = np.array(loaded.runner.forward([Job(kv, tokens)])[0])
        best = int(logits.argmax())
        answer += text.add(best)
        if not (one.startswith(answer) and other.startswith(answer)) or best in (
            loaded.tokenizer.end_of_turn
        ):
            second, first = np.sort(logits)[-2:]
            return Divergence(position, float(first - second), tie_limit(loaded, prompt))
        tokens, position = [best], position + 1


def plain_answer(loaded: LoadedModel, messages: Messages, max_tokens: int) -> str:
    """mlx-lm alone: its model, its cache, nothing quantized."""
    cache, text, answer = make_prompt_cache(loaded.model), loaded.tokenizer.stream(), ""
    tokens = loaded.tokenizer.encode_chat(request.Conversation(messages))
    for _ in range(max_tokens):
        best = int(mx.argmax(loaded.model(mx.array([tokens]), cache=cache)[0, -1]))
        if best in loaded.tokenizer.end_of_turn:
            break
        answer, tokens = answer + text.add(best), [best]
    return answer
