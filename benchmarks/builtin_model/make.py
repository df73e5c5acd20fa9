"""Make the built-in model again: `python -m benchmarks.builtin_model.make OUT`.

Corpus, tokenizer, training, export: about half an hour of CPU time.  `--quick` runs every stage
within seconds and leaves a model that knows nothing.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from agent_memory.ops import backend, blas
from benchmarks.builtin_model import corpus, tokenizer
from benchmarks.builtin_model.export import export
from benchmarks.builtin_model.facts import split_words
from benchmarks.builtin_model.recipe import FULL, QUICK, Recipe
from benchmarks.builtin_model.samples import Sampler
from benchmarks.builtin_model.train import new_model, train

HELD_OUT_EVERY = 17


def split(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Documents to train with, and those kept to test with."""
    held_out = set(range(5, len(documents), HELD_OUT_EVERY))
    return (
        [text for i, text in enumerate(documents) if i not in held_out],
        [text for i, text in enumerate(documents) if i in held_out],
    )


def make(
    folder: Path, documents: Sequence[str], recipe: Recipe, report: Callable[[str], None]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    words, _ = split_words(documents)
    report(f"corpus: {len(documents)} documents, {sum(map(len, documents))} characters")
    made = tokenizer.train(documents, words, recipe.vocabulary, recipe.num_phrase_samples)
    report(f"tokenizer: {made.get_vocab_size()} tokens")
    sampler = Sampler(made, split(documents)[0], words, recipe.seed + 1)
    model = new_model(recipe)
    train(model, sampler, recipe, report)
    export(model, made, folder)
    report(f"model: {folder}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="directory to write the model to")
    parser.add_argument("--quick", action="store_true", help="only see that every stage runs")
    args = parser.parse_args(argv)
    if backend.find() == "cpu":
        blas.preload(os.environ)

    def report(line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    make(args.out, list(corpus.documents()), QUICK if args.quick else FULL, report)


if __name__ == "__main__":
    main()
