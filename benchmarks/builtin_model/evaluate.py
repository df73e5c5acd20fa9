"""What the model can do: `python -m benchmarks.builtin_model.evaluate [MODEL_DIR]`.

Perplexity of text it has not seen, recall of facts with words it has not seen, both with the
context's K and V quantized as a memory on disk would hold them, and speed.  Float32; prints JSON.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.llama import Model, ModelArgs
from tokenizers import Tokenizer

from agent_memory import builtin
from agent_memory.ops import backend, blas
from benchmarks.builtin_model import corpus
from benchmarks.builtin_model.facts import HAVE_READ, READ_THIS, split_words
from benchmarks.builtin_model.make import split
from benchmarks.builtin_model.samples import Ids, Pieces, Sampler, count, flat

KV = tuple[int, int] | None
"""(bits, group size), or None for as computed."""

FORMATS: tuple[KV, ...] = (None, (8, 64), (4, 64), (3, 32), (2, 32))
FACT_COUNTS = (1, 8, 16, 32)
CONTEXTS = (256, 512, 1024, 2048, 4096)


def load(folder: Path) -> Model:
    config = json.loads((folder / "config.json").read_text())
    known = {name: config[name] for name in ModelArgs.__dataclass_fields__ if name in config}
    model = Model(ModelArgs(**known))
    model.load_weights(str(folder / "model.safetensors"))
    model.set_dtype(mx.float32)
    return model


def held_out_sampler(folder: Path, documents: Sequence[str], seed: int) -> Sampler:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Sampler(tokenizer, split(documents)[1], split_words(documents)[1], seed)


def predict(model: Model, context: Ids, rest: Ids, kv: KV) -> mx.array:
    """Logits [len(rest), V] that foretell `rest`, after a context kept as `kv`."""
    cache = make_prompt_cache(model)
    last = model(mx.array([context]), cache=cache)[:, -1:]
    if kv is not None:
        for layer in cache:
            layer.keys, layer.values = _kept(layer.keys, *kv), _kept(layer.values, *kv)
    following = model(mx.array([rest]), cache=cache)[:, :-1]
    return mx.concatenate([last, following], axis=1)[0]


def _kept(x: mx.array, bits: int, group_size: int) -> mx.array:
    return mx.dequantize(*mx.quantize(x, group_size, bits), group_size, bits)


def perplexity(model: Model, passages: Sequence[Ids], context: int, kv: KV = None) -> float:
    """Of each passage's second half, after `context` tokens."""
    losses = []
    for passage in passages:
        half = len(passage) // 2
        before, rest = passage[half - context : half], passage[half:]
        logits = predict(model, before, rest, kv)
        losses.append(nn.losses.cross_entropy(logits, mx.array(rest), reduction="mean"))
    return round(float(mx.exp(mx.stack(losses).mean())), 2)


def recall_case(sampler: Sampler, length: int, num_facts: int) -> tuple[Ids, Ids]:
    """(a conversation of about `length` tokens that ends in a question, the answer's value)."""
    facts = sampler.teller.facts(num_facts)
    told: Pieces = []
    for fact in facts:
        told += sampler.exchange(*sampler.teller.tell([fact]))
    asked = sampler.rng.choice(facts)
    lead, value, rest = (sampler.encode(part) for part in asked.answer())
    question = sampler.turn("user", (sampler.encode(sampler.teller.ask(asked)), 0))
    question += [(sampler.reply_head() + lead, 0)]
    while (room := length - count(told) - count(question) - len(value)) > 60:
        passage = sampler.encode(READ_THIS) + sampler.passage(min(room - 30, 400))
        told += sampler.turn("user", (passage, 0))
        told += sampler.turn("assistant", (sampler.encode(HAVE_READ), 0))
    return flat(told + question), value + rest


def recall(
    model: Model, sampler: Sampler, length: int, num_facts: int, cases: int, kv: KV = None
) -> float:
    """The share of questions whose value is answered exactly; restored 20 tokens before the end."""
    hits = 0
    for _ in range(cases):
        prompt, value = recall_case(sampler, length, num_facts)
        at = len(prompt) - 20
        logits = predict(model, prompt[:at], prompt[at:] + value, kv)
        hits += bool(mx.array_equal(mx.argmax(logits[-len(value) :], axis=-1), mx.array(value)))
    return round(hits / cases, 3)


def speed(model: Model, prompt: Ids, num_tokens: int = 64) -> dict[str, int]:
    """Tokens per second."""
    cache, started = make_prompt_cache(model), time.perf_counter()
    token = mx.argmax(model(mx.array([prompt]), cache=cache)[:, -1:], axis=-1)
    mx.eval(token)
    prefilled = time.perf_counter()
    for _ in range(num_tokens):
        token = mx.argmax(model(token, cache=cache)[:, -1:], axis=-1)
        mx.eval(token)
    decoded = time.perf_counter()
    return {
        "prefill": round(len(prompt) / (prefilled - started)),
        "decode": round(num_tokens / (decoded - prefilled)),
    }


def passages(sampler: Sampler, number: int, length: int) -> list[Ids]:
    found: list[Ids] = []
    while len(found) < number:
        if len(passage := sampler.passage(length)) == length:
            found.append(passage)
    return found


def evaluate(folder: Path, documents: Sequence[str], cases: int) -> dict[str, object]:
    model = load(folder)
    texts = passages(held_out_sampler(folder, documents, 99), 12, 1024)

    def recalled(length: int, num_facts: int, kv: KV = None) -> float:
        sampler = held_out_sampler(folder, documents, 777 + length + num_facts)
        return recall(model, sampler, length, num_facts, cases, kv)

    return {
        "perplexity by kv": {str(kv): perplexity(model, texts, 512, kv) for kv in FORMATS},
        "perplexity with 32 tokens of context": perplexity(model, texts, 32),
        "recall of 4 facts by context": {length: recalled(length, 4) for length in CONTEXTS},
        "recall at 2048 by facts": {number: recalled(2048, number) for number in FACT_COUNTS},
        "recall at 2048 by kv": {str(kv): recalled(2048, 4, kv) for kv in FORMATS[1:]},
        "tokens per second by prompt": {
            length: speed(model, (texts[0] + texts[1])[:length]) for length in (512, 2048)
        },
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", default=builtin.PATH)
    parser.add_argument("--cases", type=int, default=24, help="questions per recall figure")
    args = parser.parse_args(argv)
    if backend.find() == "cpu":
        blas.preload(os.environ)
    measured = evaluate(args.model, list(corpus.documents()), args.cases)
    sys.stdout.write(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
