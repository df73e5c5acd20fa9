"""The model's largest choice at every position of ordinary text, computed in every way there is.

One prefill is the reference; other chunk sizes, token by token, and restored in the middle must
choose the same, but for ties.  A tie is a position where the two best logits are closer than the
arithmetic can tell: at `none` 1e-3; quantized, closer than plain mlx-lm with the same quantization
differs from itself when its embedding is scaled by one part in a million.
"""

from collections.abc import Callable, Iterator

import mlx.core as mx
import pytest
from mlx_lm.models.cache import QuantizedKVCache

from agent_memory.kvcache.run import RunBuilder
from agent_memory.kvcache.sequence_kv import SequenceKV
from agent_memory.model.loader import LoadedModel
from agent_memory.model.runner import Job
from tests.conftest import ordinary_text

NUM_TEXTS = 5
TEXT_TOKENS = 1024


def texts(loaded: LoadedModel) -> list[list[int]]:
    ids = loaded.tokenizer.encode(ordinary_text(60_000))
    assert len(ids) >= NUM_TEXTS * TEXT_TOKENS
    return [ids[i * TEXT_TOKENS : (i + 1) * TEXT_TOKENS] for i in range(NUM_TEXTS)]


def forced(loaded: LoadedModel, kv: SequenceKV, tokens: list[int], chunk: int) -> mx.array:
    """Logits of all tokens [tokens, vocab], computed `chunk` at a time."""
    out = []
    for at in range(0, len(tokens), chunk):
        piece = tokens[at : at + chunk]
        out.append(loaded.runner.forward([Job(kv, piece, num_logits=len(piece))]))
        mx.eval(out[-1])
    return mx.concatenate(out)


def whole(loaded: LoadedModel, tokens: list[int]) -> mx.array:
    return forced(loaded, SequenceKV(loaded.proven.spec), tokens, len(tokens))


def chunked(size: int) -> Callable[[LoadedModel, list[int]], mx.array]:
    return lambda loaded, tokens: forced(
        loaded, SequenceKV(loaded.proven.spec), tokens, min(size, len(tokens))
    )


def restored(loaded: LoadedModel, tokens: list[int]) -> mx.array:
    """The first 600 tokens are computed, copied out in blocks, and gone on from as a run."""
    spec, middle = loaded.proven.spec, 600
    first = SequenceKV(spec)
    logits = forced(loaded, first, tokens[:middle], 256)
    builder = RunBuilder(spec, middle)
    for at in range(0, middle, 256):
        end = min(at + 256, middle)
        builder.write(at, end - at, end - at, first.copy_out(at, end))
    rest = forced(loaded, SequenceKV(spec, builder.finish(middle)), tokens[middle:], 1)
    return mx.concatenate([logits, rest])


WAYS = {"37": chunked(37), "256": chunked(256), "1": chunked(1), "restored": restored}


def plain_noise(loaded: LoadedModel, tokens: list[int]) -> float:
    """How far plain mlx-lm is from itself after scaling the embedding by 1 + 1e-6."""
    form = loaded.proven.spec.groups[0].k
    if form.bits is None:
        return 1e-3
    embedding = loaded.model["model"]["embed_tokens"]
    weight, logits = embedding.weight, []
    for scale in (1.0, 1.0 + 1e-6):
        embedding.weight = weight * scale
        cache = [QuantizedKVCache(form.group_size, form.bits) for _ in loaded.runner.layers]
        logits.append(loaded.model(mx.array([tokens]), cache=cache)[0])
        mx.eval(logits[-1])
    embedding.weight = weight
    return float(mx.abs(logits[0] - logits[1]).max())


def differing(reference: mx.array, other: mx.array) -> Iterator[tuple[int, float]]:
    """(position, margin of the reference's two best logits) wherever the choice differs."""
    differs = mx.argmax(reference, axis=-1) != mx.argmax(other, axis=-1)
    top = mx.sort(reference, axis=-1)[:, -2:]
    for position, flag in enumerate(differs.tolist()):
        if flag:
            yield position, float(top[position, 1] - top[position, 0])


@pytest.mark.timeout(300)
def test_every_way_chooses_the_same(
    loaded: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    found: dict[str, list[tuple[int, float, float]]] = {way: [] for way in WAYS}
    for tokens in texts(loaded):
        reference, noise = whole(loaded, tokens), plain_noise(loaded, tokens)
        for way, compute in WAYS.items():
            for position, margin in differing(reference, compute(loaded, tokens)):
                found[way].append((position, margin, noise))
    positions = NUM_TEXTS * TEXT_TOKENS
    bits = loaded.proven.spec.groups[0].k.bits
    with capsys.disabled():
        print(f"\nkv {bits or 'none'}: {positions} positions", found)
    for way, ties in found.items():
        assert len(ties) <= (positions // 1000 if bits else 0), way
        assert all(margin < noise for _, margin, noise in ties), (way, ties)
