"""The part `quality`: what quantized memory costs in perplexity and in facts recalled.

Perplexity is of a text that the built-in model was not trained on, all of it scored through HTTP;
beside it mlx-lm computes the same tokens by itself, for `mlx_lm.server` scores no prompts.  Facts
are told, pages follow, and after a restart one of the facts is asked for.  The forms of speech are
those that the built-in model was trained on, and simple enough for any model that chats.  Main
thread.
"""

import inspect
import math
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

import httpx
import numpy as np

from agent_memory.bench.bench import Bench, Mode, Part
from agent_memory.bench.limits import Scored
from agent_memory.bench.models import Model
from agent_memory.bench.servers import CHUNKS, MlxLm, Ours, Server
from agent_memory.bench.streams import TIMEOUT_S, Message, assistant, user

NAME = "quality"
ALONE = "mlx-lm alone"
TEXT = "numpy's docstrings"
ANSWER_TOKENS = 48
PAGE_TOKENS = 350
CHARACTERS_PER_TOKEN = 8
"""More than any tokenizer needs."""
NUM_FACTS = 4
KEYS = (
    "orchid harbor lantern copper meadow violin anchor pepper saddle glacier walnut ribbon temple "
    "falcon cactus marble pillow rocket shadow tunnel velvet willow ginger bucket"
).split()


@dataclass(frozen=True, slots=True)
class Sizes:
    """`passages` of `tokens` are scored; `questions` are asked behind `pages` each."""

    passages: int
    tokens: int
    questions: int
    pages: int


BITS = ("none", "8", "4")
SIZES: dict[Mode, Sizes] = {
    "quick": Sizes(2, 256, 4, 1),
    "normal": Sizes(4, 768, 8, 3),
    "full": Sizes(16, 2048, 32, 8),
}


@dataclass(frozen=True, slots=True)
class Talk:
    """A conversation that ends in a question.  `fact`: what a right answer holds."""

    agent: str
    messages: Sequence[Message]
    fact: str

    def is_right(self, answer: str) -> bool:
        return re.search(rf"\b{re.escape(self.fact)}\b", answer) is not None


def measure(bench: Bench) -> None:
    assert bench.ours is not None
    sizes = SIZES[bench.mode]
    model = next((model for model in bench.models if not model.endless), bench.models[0])
    talks = list(conversations(sizes, bench.pages.take))
    bench.course.steps(len(BITS) + 2)
    with bench.course.step("mlx-lm alone"):
        scored = [bench.limits.score(model, text, sizes.tokens) for text in passages(sizes)]
    with bench.course.step("mlx_lm.server"):
        other = MlxLm(bench.folder, CHUNKS[0])
        with other.start([model], NAME) as server:
            asked = [server.ask(talk.agent, talk.messages, model, ANSWER_TOKENS) for talk in talks]
        others_share = _share(talks, [stream.text for stream in asked])
    for bits in BITS:
        with bench.course.step(f"{bits} bits"):
            with bench.ours.start([model], f"{NAME}-{bits}", "--kv-bits", bits) as server:
                _note_perplexity(bench, server, model, bits, scored)
                for talk in talks:
                    server.ask(talk.agent, talk.messages, model)
                server.stop()
            share = _recalled(bench, bench.ours, model, bits, talks)
            for name, right in ((bench.ours.name, share), (other.name, others_share)):
                at = _at(model, bits, len(talks))
                bench.notes.add("recall", at, "", name, right, more_is_better=True)


def _note_perplexity(
    bench: Bench, server: Server, model: Model, bits: str, scored: Sequence[Scored]
) -> None:
    """A passage is a round."""
    at: dict[str, str | int] = {"model": model.name, "kv_bits": bits, "text": TEXT}
    for one in scored:
        logprob = score(server.url, model.name, one.ids)
        for name, value in ((server.name, logprob), (ALONE, one.logprob)):
            bench.notes.add("perplexity", at, "", name, perplexity(value, len(one.ids)))
    alone = [perplexity(one.logprob, len(one.ids)) for one in scored]
    bench.notes.limit("perplexity", at, statistics.median(alone))


def _recalled(bench: Bench, ours: Ours, model: Model, bits: str, talks: Sequence[Talk]) -> float:
    """By a process that has read all this from the disk."""
    with ours.start([model], f"{NAME}-{bits}", "--kv-bits", bits) as server:
        asked = [server.ask(talk.agent, talk.messages, model, ANSWER_TOKENS) for talk in talks]
    restored = sum(s.cached_tokens for s in asked) / sum(s.prompt_tokens for s in asked)
    at = _at(model, bits, len(talks))
    bench.notes.add("restored share of prompts", at, "", ours.name, restored, more_is_better=True)
    return _share(talks, [stream.text for stream in asked])


def _at(model: Model, bits: str, num_questions: int) -> dict[str, str | int]:
    return {"model": model.name, "kv_bits": bits, "questions": num_questions}


def _share(talks: Sequence[Talk], answers: Sequence[str]) -> float:
    right = [talk.is_right(text) for talk, text in zip(talks, answers, strict=True)]
    return sum(right) / len(right)


def score(url: str, model: str, ids: Sequence[int]) -> float:
    """The sum of the log probabilities of all tokens but the first."""
    body = {"model": model, "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=TIMEOUT_S, trust_env=False)
    of_tokens = answer.raise_for_status().json()["choices"][0]["logprobs"]["token_logprobs"]
    assert len(of_tokens) == len(ids), "not every token was scored"
    return math.fsum(of_tokens[1:])


def perplexity(logprob: float, num_tokens: int) -> float:
    return math.exp(-logprob / (num_tokens - 1))


def passages(sizes: Sizes) -> Iterator[str]:
    """Long enough for the tokens wanted, spread evenly over the text."""
    docstrings = (inspect.getdoc(getattr(np, name)) for name in sorted(np.__all__))
    text = "\n\n".join(dict.fromkeys(doc for doc in docstrings if doc))
    for number in range(sizes.passages):
        at = number * len(text) // sizes.passages
        yield text[at : at + CHARACTERS_PER_TOKEN * sizes.tokens]


def conversations(sizes: Sizes, page: Callable[[int], str]) -> Iterator[Talk]:
    """`page`: gives a text of so many tokens that begins with a request to read it."""
    random = Random(11)
    for number in range(sizes.questions):
        facts = {key: str(random.randint(1000, 9999)) for key in random.sample(KEYS, NUM_FACTS)}
        told = "\n".join(f"- the code for {key} is {value}" for key, value in facts.items())
        messages = [user(f"Remember these facts:\n{told}"), assistant("Noted.")]
        for _ in range(sizes.pages):
            messages += [user(page(PAGE_TOKENS)), assistant("I have read it.")]
        key = random.choice(list(facts))
        messages.append(user(f"What is the code for {key}?"))
        yield Talk(f"{NAME}-{number}", messages, facts[key])


PART = Part(NAME, "Quality", measure, {"quick": 0, "normal": 50, "full": 400})
