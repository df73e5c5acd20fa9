"""The built-in model can be made again, and is what its document says.

Every stage for real, only smaller: a slice of the corpus, a tokenizer of 320 tokens, two steps.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from random import Random
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import load as mlx_lm_load
from tokenizers import Tokenizer

from agent_memory import builtin
from benchmarks.builtin_model import corpus, cpu_math, evaluate, forward, tokenizer
from benchmarks.builtin_model.facts import Storyteller, split_words
from benchmarks.builtin_model.make import make, split
from benchmarks.builtin_model.recipe import FULL, QUICK
from benchmarks.builtin_model.samples import VALUE, Sampler, count, flat, joined
from benchmarks.builtin_model.train import new_model, training_step
from tests.source import ROOT


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return list(islice(corpus.documents(), 40))


@pytest.fixture(scope="module")
def trained(documents: list[str]) -> Tokenizer:
    words, _ = split_words(documents)
    return tokenizer.train(documents, words, QUICK.vocabulary, QUICK.num_phrase_samples)


@pytest.fixture
def sampler(documents: list[str], trained: Tokenizer) -> Sampler:
    return Sampler(trained, documents, split_words(documents)[0], seed=3)


def test_the_corpus_is_plain_text_without_repeats(documents: list[str]) -> None:
    assert len(documents) == len({text[:400] for text in documents}) == 40
    assert all(text.isascii() and len(text) >= corpus.MIN_CHARS for text in documents)


def test_what_is_held_out_is_never_trained_on(documents: list[str]) -> None:
    train, test = split(documents)
    assert sorted(train + test) == sorted(documents) and not set(train) & set(test) and test
    known, unknown = split_words(documents)
    assert not set(known) & set(unknown) and unknown


def test_a_fact_is_told_asked_and_answered(documents: list[str]) -> None:
    teller = Storyteller(Random(1), split_words(documents)[0])
    facts = teller.facts(30)
    assert len({fact.subject for fact in facts}) == 30
    for fact in facts:
        message, noted = teller.tell([fact])
        assert fact.value in message and fact.value in noted
        assert fact.subject in teller.ask(fact) and fact.value not in teller.ask(fact)
    mine = next(fact for fact in facts if fact.subject.startswith("my "))
    assert "".join(mine.answer()) == f"Your {mine.subject[3:]} is {mine.value}."


def test_the_tokenizer_gives_back_any_text(trained: Tokenizer) -> None:
    for text in ("What is the code for orchid?", "7319", "naïve 漢字 \n\t", "<|im_start|>user\n"):
        ids = trained.encode(text, add_special_tokens=False).ids
        assert trained.decode(ids, skip_special_tokens=False) == text
    assert len(trained.encode("7319").ids) == 4


@pytest.mark.parametrize("length", [8, 40, 700])
def test_samples_have_their_shapes_and_positions_grow(sampler: Sampler, length: int) -> None:
    for _ in range(20):
        ids, positions, weights = sampler.sample(length, 1000)
        assert ids.shape == positions.shape == (length + 1,) and weights.shape == (length,)
        assert positions[0] == 0 and (np.diff(positions) >= 1).all() and positions[-1] < 1000


def test_a_recalled_value_counts_most(sampler: Sampler) -> None:
    pieces = sampler.chat(2000)
    ids, weights = joined(pieces)
    assert ids.tolist() == flat(pieces) and len(weights) == count(pieces)
    values = flat([(ids, weight) for ids, weight in pieces if weight == VALUE])
    assert values and ids[weights == VALUE].tolist() == values


def gradient(function: Callable[[mx.array], object], x: mx.array) -> mx.array:
    """Of the outputs' sum, each output with a weight of its own."""

    def total(x: mx.array) -> mx.array:
        out = cast(mx.array, function(x))
        return (out * mx.arange(out.size).reshape(out.shape)).sum()

    slopes: mx.array = mx.grad(total)(x)
    return slopes


def test_the_arithmetic_and_its_gradients_are_those_of_mlx() -> None:
    mx.random.seed(5)
    x, y = mx.random.normal((2, 3, 16)) * 3, mx.random.normal((2, 3, 16)) * 3
    targets, weights = mx.random.randint(0, 16, (2, 3)), mx.random.uniform(shape=(2, 3))

    def entropy(x: mx.array) -> mx.array:
        return cast(tuple[mx.array, mx.array], cpu_math.cross_entropy(x, targets, weights))[0]

    def plain_entropy(x: mx.array) -> mx.array:
        return (nn.losses.cross_entropy(x, targets) * weights).sum()

    same: list[tuple[Callable[[mx.array], object], Callable[[mx.array], mx.array]]] = [
        (cpu_math.exp, mx.exp),
        (cpu_math.softmax, lambda x: mx.softmax(x, axis=-1)),
        (lambda x: cpu_math.swiglu(x, y), lambda x: x * mx.sigmoid(x) * y),
        (lambda x: cpu_math.swiglu(y, x), lambda x: y * mx.sigmoid(y) * x),
        (entropy, plain_entropy),
    ]
    for ours, theirs in same:
        assert mx.allclose(cast(mx.array, ours(x)), theirs(x), rtol=1e-5, atol=1e-5)
        if ours is not cpu_math.exp:  # by its bits: only used inside the others
            assert mx.allclose(gradient(ours, x), gradient(theirs, x), rtol=1e-4, atol=1e-4)


def test_the_training_forward_is_the_model_s_own(sampler: Sampler) -> None:
    model = new_model(QUICK)
    ids = mx.array(sampler.batch(2, 40, 40)[0])
    positions = mx.broadcast_to(mx.arange(41), ids.shape)
    assert mx.allclose(forward.logits(model, ids, positions), model(ids), rtol=1e-3, atol=1e-3)


def test_a_step_lowers_the_loss_on_its_own_batch(sampler: Sampler) -> None:
    step = training_step(new_model(QUICK), QUICK)
    batch = [mx.array(part) for part in sampler.batch(2, 32, 64)]
    assert step(*batch) > step(*batch)


@pytest.mark.slow
def test_every_stage_from_the_corpus_to_a_model_that_mlx_lm_loads(
    documents: list[str], tmp_path: Path
) -> None:
    lines: list[str] = []
    make(tmp_path / "model", documents, QUICK, lines.append)
    model, loaded = mlx_lm_load(str(tmp_path / "model"))[:2]
    assert lines[-2].startswith("step 2 of 2, loss ")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        path.name for path in builtin.PATH.iterdir() if not path.name.startswith("__")
    }
    config, shipped = (
        json.loads((folder / "tokenizer_config.json").read_text())
        for folder in (tmp_path / "model", builtin.PATH)
    )
    assert config == shipped
    out = model(mx.array([loaded.encode("<|im_start|>user\nHello!<|im_end|>\n")]))
    assert out.shape[-1] == QUICK.vocabulary and bool(mx.isfinite(out).all())


def test_the_recipe_makes_what_ships() -> None:
    shipped = json.loads((builtin.PATH / "config.json").read_text())
    args = asdict(FULL.model_args())
    assert {name: args[name] for name in args if name in shipped} == {
        name: shipped[name] for name in args if name in shipped
    }
    weights = mx.load(str(builtin.PATH / "model.safetensors"))
    assert isinstance(weights, dict)
    ours = dict(tree_flatten(new_model(FULL).parameters()))
    assert {name: w.shape for name, w in weights.items()} == {n: w.shape for n, w in ours.items()}


def test_what_ships_recalls_what_it_was_told(documents: list[str]) -> None:
    model = evaluate.load(builtin.PATH)
    sampler = evaluate.held_out_sampler(builtin.PATH, documents, seed=8)
    assert evaluate.recall(model, sampler, 300, 4, cases=4) == 1.0
    assert evaluate.recall(model, sampler, 300, 4, cases=4, kv=(4, 64)) == 1.0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.suite("built-in model made from the whole corpus", planned=1)
def test_the_command_makes_and_evaluates_with_the_whole_corpus(tmp_path: Path) -> None:
    for module, *args in (("make", "--quick"), ("evaluate", "--cases", "1")):
        command = [sys.executable, "-m", f"benchmarks.builtin_model.{module}", str(tmp_path)]
        command += args
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=290)
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["recall at 2048 by facts"].keys() == {"1", "8", "16", "32"}
