"""The part `concurrency`: many agents at once, in every way they may arrive.

    equal         all at the same moment, with prompts of one length
    ragged        all at the same moment, with short prompts and long ones
    staggered     each as soon as the one before has some tokens
    long prompt   one, while others are being answered

Knows no server but by its streams.  Main thread.
"""

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import httpx
import numpy as np

from agent_memory.bench.arrivals import Landed, at_once, landing, staggered
from agent_memory.bench.bench import Bench, Mode, Part
from agent_memory.bench.limits import Limits
from agent_memory.bench.measured import At, Measured
from agent_memory.bench.models import Model
from agent_memory.bench.servers import CHUNKS, MLX_LM, Contender, Server, in_turn, start_all
from agent_memory.bench.streams import (
    Stream,
    gaps_between,
    overall_tokens_per_second,
    tokens_per_second,
)
from agent_memory.bench.texts import Pages
from agent_memory.errors import ServerFailed

EQUAL, RAGGED, STAGGERED, LONG_PROMPT = "equal", "ragged", "staggered", "long prompt"

RATE = "tokens per second"
FIRST = "first token"
FIRST_P95 = "first token, p95"
GAP = "gap between tokens"
GAP_P95 = "gap between tokens, p95"
LONGEST_GAP = "longest gap between tokens"
LONGEST_WHILE = "longest gap while the long prompt lands"
FAIRNESS = "slowest stream / fastest stream"

SHORTEST = 50
"""Tokens of the shortest of ragged prompts."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """`equal`, `ragged`, `staggered`, `running`: numbers of streams to try.  `prompt`: tokens of
    each but ragged ones, whose longest has `longest`; `long` of the one that arrives.  `settings`:
    all of `mlx_lm.server`, not just its default, also where no long prompt lands.
    """

    rounds: int
    decoded: int
    equal: tuple[int, ...]
    prompt: int
    running: tuple[int, ...]
    long: int
    ragged: tuple[int, ...] = ()
    longest: int = 0
    staggered: tuple[int, ...] = ()
    settings: bool = False


SIZES: dict[Mode, Sizes] = {
    "quick": Sizes(1, 32, (1, 4), 200, (1,), 1000),
    "normal": Sizes(2, 48, (1, 4, 8), 250, (2,), 1500, (4,), 1000, (4,)),
    "full": Sizes(5, 128, (1, 2, 4, 8, 16), 500, (4,), 3000, (8, 16), 1500, (8,), settings=True),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """`lengths`: prompt tokens of each stream; of those that run, where a long prompt arrives."""

    arrival: str
    lengths: tuple[int, ...]
    long: int = 0

    @property
    def at(self) -> dict[str, str | int]:
        return {"arrival": self.arrival, "streams": len(self.lengths)}

    def prompts(self, pages: Pages) -> list[str]:
        """The long one comes last."""
        return [pages.take(length) for length in (*self.lengths, self.long) if length]


class Value(NamedTuple):
    value: float
    unit: str
    more_is_better: bool = False


Values = dict[str, Value]


def shapes(sizes: Sizes) -> list[Shape]:
    def same(arrival: str, counts: Sequence[int], long: int = 0) -> list[Shape]:
        return [Shape(arrival, (sizes.prompt,) * n, long) for n in counts]

    return [
        *same(EQUAL, sizes.equal),
        *(Shape(RAGGED, ragged(n, sizes.longest)) for n in sizes.ragged),
        *same(STAGGERED, sizes.staggered),
        *same(LONG_PROMPT, sizes.running, sizes.long),
    ]


def ragged(count: int, longest: int) -> tuple[int, ...]:
    """From short to long, each longer than the one before by the same factor."""
    return tuple(int(length) for length in np.geomspace(SHORTEST, longest, count).round())


# ── what is seen of them ─────────────────────────────────────────────────────────────────────────


def values_of(shape: Shape, streams: Sequence[Stream]) -> Values:
    found = {RATE: Value(rate(shape, streams), "tokens/s", more_is_better=True)}
    firsts = [stream.first_token_s for stream in streams]
    found[FIRST] = Value(1000 * statistics.median(firsts), "ms")
    if len(streams) > 1:
        found[FIRST_P95] = Value(1000 * percentile(firsts, 95), "ms")
    gaps = [gap for stream in streams for gap in gaps_between(stream.moments)]
    if gaps:
        found[GAP] = Value(1000 * statistics.median(gaps), "ms")
        found[GAP_P95] = Value(1000 * percentile(gaps, 95), "ms")
        found[LONGEST_GAP] = Value(1000 * max(gaps), "ms")
    if (fair := fairness(streams)) is not None:
        found[FAIRNESS] = Value(fair, "x", more_is_better=True)
    return found


def values_of_landing(landed: Landed) -> Values:
    sent, until = landed.arriving.sent, landed.arriving.moments[0]
    came = sum(sent < at <= until for stream in landed.running for at in stream.moments)
    found = {FIRST: Value(1000 * landed.arriving.first_token_s, "ms")}
    if landed.gaps:  # else nothing ran any more
        found[RATE] = Value(came / (until - sent), "tokens/s", more_is_better=True)
        found[LONGEST_WHILE] = Value(1000 * max(landed.gaps), "ms")
    return found


def rate(shape: Shape, streams: Sequence[Stream]) -> float:
    """While all are answered at once, where they ever are; staggered ones overall."""
    last = max(stream.moments[0] for stream in streams)
    if shape.arrival != STAGGERED and last < min(stream.moments[-1] for stream in streams):
        return tokens_per_second(streams)
    return overall_tokens_per_second(streams)


def fairness(streams: Sequence[Stream]) -> float | None:
    """1: all of them got their tokens equally fast, once they had the first."""
    if len(streams) < 2 or any(len(stream.moments) < 2 for stream in streams):
        return None
    each = [statistics.mean(gaps_between(stream.moments)) for stream in streams]
    return min(each) / max(each) if max(each) else None


def percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent))


# ── the part ─────────────────────────────────────────────────────────────────────────────────────


def measure(bench: Bench) -> None:
    sizes = SIZES[bench.mode]
    model = chosen(bench)
    plan = shapes(sizes)
    bench.course.steps(2 + sizes.rounds * len(plan))
    found = Found(bench, sizes, model)
    with ExitStack() as stack:
        with bench.course.step("starting"):
            servers = start_all(stack, bench.contenders, [model], "concurrency")
            for server in servers.values():
                server.ask("warmer", "Hello!", model)
        for n in range(sizes.rounds):
            for shape in plan:
                with bench.course.step(f"{shape.arrival}, {len(shape.lengths)}"):
                    found.round(n, shape, servers)
    found.note(plan)
    with bench.course.step("limits"):
        if bench.ours is not None:  # else it may run on another machine
            for one in bench.notes:
                one.limit = limit(bench.limits, model, sizes, plan, one)


def chosen(bench: Bench) -> Model:
    """An endless one, but of a server elsewhere the one it has; its answers end when they end."""
    endless = [model for model in bench.models if model.endless and bench.ours is not None]
    return [*endless, *bench.models][0]


class Found:
    """What was measured of each shape at each server, round by round."""

    def __init__(self, bench: Bench, sizes: Sizes, model: Model) -> None:
        self._bench = bench
        self._sizes = sizes
        self._model = model
        self._values: dict[tuple[Shape, str], list[Values]] = {}
        self._failed: set[tuple[Shape, str]] = set()

    def round(self, number: int, shape: Shape, servers: dict[str, Server]) -> None:
        """Texts are new to all of them.  Raises ServerFailed if ours fails."""
        prompts = shape.prompts(self._bench.pages)
        agent = f"{number}-{shape.arrival.replace(' ', '-')}-{len(shape.lengths)}"
        for contender in in_turn(self._contenders(shape), number):
            key = shape, contender.name
            if key in self._failed:
                continue
            try:
                values = self._measured(servers[contender.name], agent, shape, prompts)
            except (httpx.HTTPError, RuntimeError, ServerFailed) as error:
                if contender is self._bench.contenders[0]:
                    raise ServerFailed(f"{contender.name}, {agent}: {error}") from error
                self._failed.add(key)
            else:
                self._values.setdefault(key, []).append(values)

    def note(self, plan: Sequence[Shape]) -> None:
        """What a server has of every round."""
        for shape in plan:
            for contender in self._contenders(shape):
                rounds = self._values.get((shape, contender.name), [])
                if len(rounds) == self._sizes.rounds:
                    self._note(shape.at, contender.name, rounds)

    def _note(self, at: At, server: str, rounds: Sequence[Values]) -> None:
        for name in rounds[0]:
            if all(name in values for values in rounds):
                for value, unit, more in (values[name] for values in rounds):
                    self._bench.notes.add(name, at, unit, server, value, more_is_better=more)

    def _contenders(self, shape: Shape) -> list[Contender]:
        """Other settings of a server matter most where a long prompt lands."""
        others = {f"{MLX_LM} {chunk}" for chunk in CHUNKS[1:]}
        every = self._sizes.settings or shape.arrival == LONG_PROMPT
        return [c for c in self._bench.contenders if every or c.name not in others]

    def _measured(self, server: Server, agent: str, shape: Shape, prompts: list[str]) -> Values:
        if shape.arrival == LONG_PROMPT:
            *running, arriving = prompts
            return values_of_landing(landing(server, agent, running, arriving, self._model))
        arrive = staggered if shape.arrival == STAGGERED else at_once
        streams = arrive(server, agent, prompts, self._sizes.decoded, self._model)
        return values_of(shape, streams)


def limit(
    limits: Limits, model: Model, sizes: Sizes, plan: Sequence[Shape], one: Measured
) -> float | None:
    """Of nothing but steps of all rows together, and of prompts one after the other."""
    shape = next(shape for shape in plan if shape.at == one.at)
    rows = len(shape.lengths)
    if one.name in (FIRST, FIRST_P95) and shape.arrival in (EQUAL, LONG_PROMPT):
        each = limits.prefill_s(model, shape.long or shape.lengths[0])
        waits = list(accumulate([each] * (1 if shape.long else rows)))
        return 1000 * percentile(waits, 50 if one.name == FIRST else 95)
    if shape.arrival not in (EQUAL, RAGGED) or one.name not in (RATE, GAP, GAP_P95):
        return None
    tokens = round(statistics.mean(shape.lengths)) + sizes.decoded // 2
    step_s = limits.step_s(model, tokens, rows)
    return rows / step_s if one.name == RATE else 1000 * step_s


PART = Part(
    "concurrency",
    "Many at once",
    measure,
    {"quick": 25, "normal": 150, "full": 2500},
    anywhere=True,
)
