"""Every family of models that is taken: restored = cold, batched = alone, chunked = whole.

Tiny random models, over block boundaries and windows.  Unquantized all three hold to rounding,
against plain mlx-lm too.  Quantized, what is restored is the same to the byte and so is a chunk
that follows it; other steps round otherwise, which now and then moves a number into the next
bucket, and a random model makes much of that.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from agent_memory.block import BLOCK_TOKENS
from agent_memory.kvcache import states
from agent_memory.kvcache.run import RunBuilder
from agent_memory.kvcache.sequence_kv import SequenceKV
from agent_memory.model.runner import Job, Runner
from tests.kvcache.kv import Payload
from tests.model import tiny

FAMILIES = {
    "llama": "mixed",
    "qwen3": "mixed",
    "qwen3_moe": "mixed",
    "openelm": "mixed",
    "gemma3": "mixed",
    "gpt_oss": "mixed",
    "gemma4": "mixed",
    "deepseek_v2": "mixed",
    "deepseek_v3": "handed",
    "qwen3_next": "split",
    "qwen3_5": "split",
    "lfm2": "split",
    "falcon_h1": "split",
    "jamba": "split",
}
"""And how the probe finds that each is to be run."""
ROUNDING = 1e-4
"""Relative to the largest logit."""
LENGTHS = [257]
MORE_LENGTHS = [1, 31, 32, 33, 255, 256, 288, 289, 300, 512, 513, 544]


# Much like others: qwen3_5, falcon_h1, llama.
SLOW = {"qwen3_next", "jamba", "qwen3", "openelm"}


@pytest.fixture(
    params=[pytest.param(f, marks=pytest.mark.slow) if f in SLOW else f for f in FAMILIES]
)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(
    params=[None, pytest.param(8, marks=pytest.mark.slow), 4], ids=["kvnone", "kv8", "kv4"]
)
def bits(request: pytest.FixtureRequest) -> int | None:
    bits: int | None = request.param
    return bits


_runners: dict[tuple[str, int | None], Runner] = {}


def runner_of(family: str, bits: int | None) -> Runner:
    if (family, bits) not in _runners:
        _runners.clear()  # a few at a time would do no harm, but tests of a family come together
        _runners[family, bits] = tiny.runner(tiny.build(family), bits)
    return _runners[family, bits]


def text(count: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, tiny.VOCAB, count)]


@dataclass
class Talk:
    """One sequence, computed in steps and committed block by block as the engine does it."""

    runner: Runner
    kv: SequenceKV
    tokens: list[int]
    logits: list[mx.array] = field(default_factory=list)
    payloads: list[Payload] = field(default_factory=list)
    checkpoints: dict[int, Payload] = field(default_factory=dict)

    def job(self, count: int) -> Job:
        return Job(self.kv, self.tokens[self.kv.length : self.kv.length + count], count)

    def commit(self) -> None:
        while self.kv.length >= BLOCK_TOKENS * (len(self.payloads) + 1):
            start = BLOCK_TOKENS * len(self.payloads)
            self.payloads.append(self.kv.copy_out(start, start + BLOCK_TOKENS))
            self.kv.release(start + BLOCK_TOKENS)
        for length in list(self.kv.marks):
            marked = self.kv.marks.pop(length)
            self.checkpoints[length] = states.copy_out(self.kv.spec, marked)

    def go_on(self, *sizes: int) -> "Talk":
        for size in sizes:
            self.logits.append(self.runner.forward([self.job(size)]))
            mx.eval(self.logits[-1])
            self.commit()
        self.kv.check()
        return self

    def restored(self, length: int | None = None) -> "Talk":
        """The same memory, through payloads; `length`: only so much of it, and that was marked."""
        done = BLOCK_TOKENS * len(self.payloads)
        blocks = list(self.payloads)
        if self.kv.length > done:
            blocks.append(self.kv.copy_out(done, self.kv.length))
        length = length or self.kv.length
        builder = RunBuilder(self.kv.spec, length)
        for n, payload in enumerate(blocks):
            start, size = n * BLOCK_TOKENS, min(BLOCK_TOKENS, self.kv.length - n * BLOCK_TOKENS)
            if start < length:
                builder.write(start, min(size, length - start), size, payload)
        if length == self.kv.length:
            builder.write_checkpoint(states.copy_out(self.kv.spec, self.kv.states))
        elif self.kv.spec.states:
            builder.write_checkpoint(self.checkpoints[length])
        kv = SequenceKV(self.kv.spec, builder.finish())
        return Talk(self.runner, kv, self.tokens, [], blocks[: length // BLOCK_TOKENS])

    @property
    def all_logits(self) -> mx.array:
        return mx.concatenate(self.logits)


def talk(runner: Runner, tokens: list[int], marked_at: Sequence[int] = ()) -> Talk:
    return Talk(runner, SequenceKV(runner.spec, marked_at=marked_at), tokens)


def far(a: mx.array, b: mx.array) -> float:
    return float(mx.abs(a - b).max()) / max(1.0, float(mx.abs(b).max()))


def plain(runner: Runner, tokens: list[int]) -> mx.array:
    model = runner.model
    out: mx.array = model(mx.array([tokens]), cache=make_prompt_cache(model))[0]
    return out


def test_the_probe_names_the_mode(family: str) -> None:
    assert runner_of(family, None).mode == FAMILIES[family]


def test_chunked_is_whole_and_as_mlx_lm_has_it(family: str) -> None:
    runner, tokens = runner_of(family, None), text(600)
    want = plain(runner, tokens)
    for sizes in ([600], [256, 256, 88], [37] * 16 + [8], [300, *[1] * 44, 256]):
        assert far(talk(runner, tokens).go_on(*sizes).all_logits, want) < ROUNDING, sizes


def test_batched_is_alone(family: str) -> None:
    """Sequences of other lengths join and leave while one decodes over several windows."""
    runner = runner_of(family, None)
    talks = [talk(runner, text(400, seed)) for seed in range(4)]
    steps = [(1, 0, 0, 0)] * 3 + [(1, 40, 0, 0), (1, 1, 255, 0)] + [(1, 1, 1, 0)] * 30
    steps += [(1, 0, 1, 70)] + [(1, 0, 1, 1)] * 80 + [(150, 1, 0, 1)]
    for step in steps:
        who = sorted((i for i in range(4) if step[i]), key=lambda i: step[i])
        logits = runner.forward([talks[i].job(step[i]) for i in who])
        mx.eval(logits)
        at = 0
        for i in who:
            talks[i].logits.append(logits[at : at + step[i]])
            talks[i].commit()
            at += step[i]
    for one in talks:
        want = plain(runner, one.tokens[: one.kv.length])
        assert far(one.all_logits, want) < ROUNDING


@pytest.mark.parametrize(
    "length", LENGTHS + [pytest.param(n, marks=pytest.mark.slow) for n in MORE_LENGTHS]
)
def test_restored_is_kept(family: str, bits: int | None, length: int) -> None:
    runner, tokens = runner_of(family, bits), text(length + 420, seed=length)
    kept = talk(runner, tokens).go_on(*sizes_to(length))
    back = kept.restored()
    assert bool(mx.array_equal(kept.go_on(64).all_logits[-64:], back.go_on(64).all_logits))
    for one in (kept, back):
        one.go_on(200)
    assert bool(mx.array_equal(kept.logits[-1], back.logits[-1]))
    assert len(kept.payloads) == len(back.payloads)
    for a, b in zip(kept.payloads, back.payloads, strict=True):
        np.testing.assert_array_equal(a, b)
    if bits is None:
        steps = [1] * 60
        assert far(kept.go_on(*steps).all_logits[-60:], back.go_on(*steps).all_logits[-60:]) < (
            ROUNDING
        )


@pytest.mark.parametrize(
    "lengths", [(30, 257, 540), pytest.param((1, 255, 256, 290), marks=pytest.mark.slow)], ids=str
)
def test_restored_in_the_middle_is_cold(family: str, lengths: tuple[int, ...]) -> None:
    """The beginning of what was kept, then other tokens: as if those had been there from the start.

    Also where the end lies far behind, so that windows have moved on.
    """
    runner, tokens = runner_of(family, None), text(700)
    kept = talk(runner, tokens, lengths).go_on(*sizes_over(lengths))
    for length in lengths:
        back = kept.restored(length)
        back.tokens = tokens[:length] + text(100, seed=length)
        want = plain(runner, back.tokens)[length:]
        assert far(back.go_on(60, *[1] * 40).all_logits, want) < ROUNDING, length


def sizes_over(lengths: Sequence[int]) -> list[int]:
    """Chunks that end at each of them, then decoding to token 552."""
    ends = sorted({*lengths, 256, 512} & set(range(513)))
    return [end - start for start, end in pairwise([0, *ends])] + [1] * 40


def sizes_to(length: int) -> list[int]:
    """Chunks of 100, then decoding: windows are dropped and blocks are filled on the way."""
    alone = min(length, 20)
    return (
        [100] * ((length - alone) // 100)
        + [n for n in [(length - alone) % 100] if n]
        + ([1] * alone)
    )
