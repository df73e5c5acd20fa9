"""What our step costs beside the model's own forward: in this process, without HTTP.

Part of `python -m benchmarks.speed --only overhead`.

Eight streams of equal length decode: our runner with a sequence's KV for each, against the bare
model on rows [8, 1] over mlx-lm's batched caches.  Both choose the most likely token, feed it to
the next step as an array, and launch that step before the last one's tokens are read, as the engine
does.  The two take turns, a burst of steps each; a ratio is of two bursts.
"""

import gc
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import BatchKVCache

from agent_memory.bench.models import random_model
from agent_memory.kvcache.sequence_kv import SequenceKV
from agent_memory.model.loader import LoadedModel, load_whole
from agent_memory.model.runner import Job
from agent_memory.model.sampler import Draw, sample
from benchmarks.figures import Figure, console, figure, ratios

ROWS = 8
CONTEXT_TOKENS = 500
CHUNK = 256
BURST = 10
"""Steps."""
BURSTS_PER_ROUND = 4
ROOM = 512
"""Tokens for which the tails have places from the beginning, as for a request's answer."""

NARROW: dict[str, object] = {
    "hidden_size": 64,
    "num_hidden_layers": 28,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
"""So little to compute that what is left is the work of building a step."""
BUILDS_PER_ROUND = 10

FEW_LAYERS = 2
"""Layers are computed one after another: what one needs for a moment the next one uses again."""
SHORT, LONG = 100, 3000


class Ours:
    def __init__(self, loaded: LoadedModel, num_tokens: int = CONTEXT_TOKENS) -> None:
        self.runner = loaded.runner
        self.kvs = [SequenceKV(self.runner.spec, reserve=num_tokens + ROOM) for _ in range(ROWS)]
        self.tokens = mx.zeros(ROWS, mx.int32)
        for prompt, kv in zip(prompts(num_tokens, loaded), self.kvs, strict=True):
            for at in range(0, num_tokens, CHUNK):
                mx.eval(self.runner.forward([Job(kv, prompt[at : at + CHUNK])]))

    def build(self) -> mx.array:
        """A step, not computed -> its tokens."""
        jobs = [Job(kv, self.tokens[row : row + 1]) for row, kv in enumerate(self.kvs)]
        self.tokens = sample(self.runner.forward(jobs), [Draw(None, 0)] * ROWS)
        return self.tokens


class Bare:
    def __init__(self, loaded: LoadedModel, num_tokens: int = CONTEXT_TOKENS) -> None:
        self.model = loaded.model
        self.cache = [BatchKVCache([0] * ROWS) for _ in self.model.layers]
        self.tokens = mx.zeros(ROWS, mx.int32)
        ids = mx.array(prompts(num_tokens, loaded))
        for at in range(0, num_tokens, CHUNK):
            mx.eval(self.model(ids[:, at : at + CHUNK], cache=self.cache))

    def build(self) -> mx.array:
        logits = self.model(self.tokens[:, None], cache=self.cache)
        self.tokens = mx.argmax(logits[:, -1], axis=-1)
        return self.tokens


Side = Ours | Bare


def prompts(num_tokens: int, loaded: LoadedModel) -> list[list[int]]:
    draw = np.random.default_rng(0).integers(4, loaded.proven.vocab_size, (ROWS, num_tokens))
    return [[int(token) for token in row] for row in draw]


def measure(folder: Path, model: Path, rounds: int) -> list[Figure]:
    return [
        *steps(model, BURSTS_PER_ROUND * rounds),
        *building(random_model(folder / "narrow", NARROW), BUILDS_PER_ROUND * rounds),
        *allocation(random_model(folder / "few-layers", {"num_hidden_layers": FEW_LAYERS})),
    ]


def loaded_with(model: Path, kv_bits: int | None) -> LoadedModel:
    return load_whole(str(model), kv_bits, 64)


# ── whole steps ──────────────────────────────────────────────────────────────────────────────────


def steps(model: Path, bursts: int) -> list[Figure]:
    figures = []
    for kv_bits in (None, 8, 4):
        loaded = loaded_with(model, kv_bits)
        ours, bare = Ours(loaded), Bare(loaded)
        took: tuple[list[float], list[float]] = [], []
        with console.status(f"steps, kv {kv_bits}"):
            for n in range(bursts + 1):
                pair = in_turn(ours, bare, n)
                if n:  # the first warms
                    took[0].append(pair[0])
                    took[1].append(pair[1])
        ms, bare_ms = (statistics.median(times) for times in took)
        console.print(
            f"a step of 8, kv {kv_bits or 'none'}: {ms:.2f} ms, the bare model {bare_ms:.2f} ms"
        )
        target = 1.1 if kv_bits is None else None
        name = f"a step of 8 in process, kv {kv_bits or 'none'} / the bare model's forward"
        figures.append(figure(name, ratios(*took), target))
    return figures


def in_turn(ours: Ours, bare: Bare, n: int) -> tuple[float, float]:
    if n % 2:
        bare_ms = burst_ms(bare)
        return burst_ms(ours), bare_ms
    return burst_ms(ours), burst_ms(bare)


def burst_ms(side: Side) -> float:
    """Milliseconds for each step of a burst."""
    with uncollected():
        began = time.perf_counter()
        last = side.build()
        mx.async_eval(last)
        for _ in range(BURST - 1):
            launched = side.build()
            mx.async_eval(launched)
            np.array(last)
            last = launched
        np.array(last)
        return 1000 * (time.perf_counter() - began) / BURST


@contextmanager
def uncollected() -> Iterator[None]:
    """Python's collector would take its time from either side as it happens to run."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# ── the time of Python alone ─────────────────────────────────────────────────────────────────────


def building(narrow: Path, builds: int) -> list[Figure]:
    """Building a step of a model of 28 layers, which is computed outside of the time."""
    times: dict[str, list[float]] = {"none": [], "4": [], "bare": []}
    loaded = {"none": loaded_with(narrow, None), "4": loaded_with(narrow, 4)}
    for each in loaded.values():
        each.runner.min_rows = 1  # as for any wider model
    sides: dict[str, Side] = {bits: Ours(each) for bits, each in loaded.items()}
    sides["bare"] = Bare(loaded["none"])
    with console.status("building steps"), uncollected():
        for n in range(builds + 1):
            for name, side in sides.items():
                began = time.perf_counter()
                tokens = side.build()
                took = 1000 * (time.perf_counter() - began)
                mx.eval(tokens)
                if n:
                    times[name].append(took)
    console.print(
        "building a step of 8 in 28 layers, ms:",
        {name: f"{statistics.median(ms):.2f}" for name, ms in times.items()},
    )
    name = "building a step of 8 in 28 layers"
    return [
        *(figure(f"{name}, kv {bits}", times[bits], None, "ms") for bits in loaded),
        figure(f"{name}, the bare model", times["bare"], None, "ms"),
    ]


# ── memory of a step ─────────────────────────────────────────────────────────────────────────────


def allocation(model: Path) -> list[Figure]:
    """What a decode step needs for a moment must not grow with the context, but for its scores.

    Scores are float32, one for each query head and token of each row; a few such arrays live at
    once.  K and V that are copied take many times as much.
    """
    figures = []
    for kv_bits in (None, 8, 4):
        loaded = loaded_with(model, kv_bits)
        with console.status(f"memory of a step, kv {kv_bits}"):
            short, long = (step_bytes(Ours(loaded, length)) for length in (SHORT, LONG))
        bits = kv_bits or "none"
        console.print(f"a step of 8 allocates, kv {bits}: {short:,} and {long:,} bytes")
        heads = loaded.model.args.num_attention_heads
        scores = ROWS * heads * (LONG - SHORT) * mx.float32.size
        name = f"bytes of a step of 8, more at {LONG} tokens than at {SHORT} / of its scores"
        figures.append(figure(f"{name}, kv {bits}", [(long - short) / scores], 4))
    return figures


def step_bytes(side: Ours) -> int:
    """The peak within one step, evaluated at once, above what is in use before it."""
    for _ in range(3):
        mx.eval(side.build())
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(side.build())
    return mx.get_peak_memory() - before
