"""The model's largest choice at every position of ordinary text, computed in every way there is.

One prefill is the reference; other chunk sizes, token by token, and restored in the middle must
choose the same, but for ties.  A tie is a position where the two best logits are closer than the
arithmetic can tell: at `none` 1e-3; quantized, closer than plain mlx-lm with the same quantization
differs from itself when its embedding is scaled by a few parts in a million.
"""

import sys
from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np
import pytest

from agent_memory.kvcache.run import RunBuilder
from agent_memory.kvcache.sequence_kv import SequenceKV
from agent_memory.model.loader import LoadedModel
from agent_memory.model.runner import Job
from tests.conftest import ordinary_text
from tests.marks import first_is_fast
from tests.ties import tie_limit

Way = Callable[[LoadedModel, list[list[int]]], list[mx.array]]

NUM_TEXTS = 10


def texts(loaded: LoadedModel, num_tokens: int) -> list[list[int]]:
    """Spread evenly over all there is."""
    ids = loaded.tokenizer.encode(ordinary_text())
    step = len(ids) // NUM_TEXTS
    return [ids[i * step : i * step + num_tokens] for i in range(NUM_TEXTS)]


def forced(
    loaded: LoadedModel, kvs: list[SequenceKV], texts: list[list[int]], chunk: int
) -> list[mx.array]:
    """Logits of all tokens of each text [tokens, vocab]; all texts in one step, a chunk of each."""
    out: list[list[mx.array]] = [[] for _ in texts]
    for at in range(0, len(texts[0]), chunk):
        pieces = [text[at : at + chunk] for text in texts]
        size = len(pieces[0])
        jobs = [Job(kv, piece, num_logits=size) for kv, piece in zip(kvs, pieces, strict=True)]
        logits = loaded.runner.forward(jobs)
        mx.eval(logits)
        for i, rows in enumerate(out):
            rows.append(logits[i * size : (i + 1) * size])
    return [mx.concatenate(rows) for rows in out]


def chunked(size: int) -> Way:
    def compute(loaded: LoadedModel, texts: list[list[int]]) -> list[mx.array]:
        kvs = [SequenceKV(loaded.proven.spec) for _ in texts]
        return forced(loaded, kvs, texts, size)

    return compute


def restored(loaded: LoadedModel, texts: list[list[int]]) -> list[mx.array]:
    """The first tokens are computed, copied out in blocks, and gone on from as a run."""
    spec, middle = loaded.proven.spec, 300
    kvs = [SequenceKV(spec) for _ in texts]
    first = forced(loaded, kvs, [text[:middle] for text in texts], 256)
    runs = []
    for kv in kvs:
        builder = RunBuilder(spec, middle)
        for at in range(0, middle, 256):
            end = min(at + 256, middle)
            builder.write(at, end - at, end - at, kv.copy_out(at, end))
        runs.append(SequenceKV(spec, builder.finish()))
    rest = forced(loaded, runs, [text[middle:] for text in texts], 1)
    return [mx.concatenate(list(pair)) for pair in zip(first, rest, strict=True)]


WAYS = {"37": chunked(37), "256": chunked(256), "1": chunked(1), "restored": restored}


def differing(reference: mx.array, other: mx.array) -> Iterator[tuple[int, float]]:
    """(position, margin of the reference's two best logits) wherever the choice differs."""
    differs = np.array(mx.argmax(reference, axis=-1) != mx.argmax(other, axis=-1))
    top = np.array(mx.sort(reference, axis=-1)[:, -2:])
    for position in np.flatnonzero(differs):
        yield int(position), float(top[position, 1] - top[position, 0])


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("num_texts", "num_tokens"), first_is_fast((2, 352), (NUM_TEXTS, 512)))
def test_every_way_chooses_the_same(
    loaded: LoadedModel, num_texts: int, num_tokens: int, capsys: pytest.CaptureFixture[str]
) -> None:
    all_texts = texts(loaded, num_tokens)[:num_texts]
    reference = chunked(num_tokens)(loaded, all_texts)
    noise = [tie_limit(loaded, text) for text in all_texts]
    found = {
        way: [
            (position, margin, noise[i])
            for i, logits in enumerate(compute(loaded, all_texts))
            for position, margin in differing(reference[i], logits)
        ]
        for way, compute in WAYS.items()
    }
    positions = num_texts * num_tokens
    bits = loaded.proven.spec.groups[0].k.bits
    with capsys.disabled():
        sys.stdout.write(f"\nkv {bits or 'none'}: {positions} positions, differing {found}\n")
    for way, ties in found.items():
        assert len(ties) <= (max(1, positions // 1000) if bits else 0), way
        assert all(margin < limit for _, margin, limit in ties), (way, ties)
