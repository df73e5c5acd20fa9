"""Ours beside mlx_lm.server while both compute: decoding, gaps, memory, prefill, overhead.

    python -m benchmarks.speed [--rounds 5] [--only decode,gaps,...] [--json FILE]

Real servers on a Llama of 57 million random float32 parameters with the same OpenBLAS, ours at each
--kv-bits and theirs at three chunk sizes.  They take turns, round by round, each text is new to all
of them; a ratio is of one round.  Theirs is the setting that does best at what is measured, where
nothing else is said.  Exit status 1 if a target is missed.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from agent_memory.bench.arrivals import at_once, landing
from agent_memory.bench.servers import Server, metric
from agent_memory.bench.streams import Stream, tokens_per_second
from agent_memory.bench.texts import Pages
from agent_memory.ops import blas
from benchmarks import overhead
from benchmarks.figures import Figure, console, figure, ratios, report
from benchmarks.fleet import NAMES, OURS, THEIRS, Fleet, in_turn

EQUAL = [500] * 8
RAGGED = [50, 100, 200, 400, 700, 1200, 2000, 3000]
SHAPES = {"1 stream": ([500], 0.95), "8 streams": (EQUAL, 1.0), "8 ragged": (RAGGED, 1.5)}
"""Prompt tokens of each stream, and what ours / theirs should be at least."""
NUM_DECODED = 128
LONG_TOKENS = 3000
STEP_TOKENS = 256  # our default
FULL_STEPS = LONG_TOKENS // STEP_TOKENS
PREFILL_TOKENS = (1500, 3000)
PREFILL_TARGET = {"none": 0.95, "8": 0.8, "4": 0.8}
MEMORY_ROUNDS = 3  # at most: it hardly varies

Samples = dict[str, list[float]]
"""By name of a server, a value for each round."""


def nothing() -> Samples:
    return {name: [] for name in NAMES}


def best(samples: Samples, *, most: bool) -> str:
    """Their best setting at this."""
    return (max if most else min)(THEIRS, key=lambda name: statistics.median(samples[name]))


def tell(what: str, samples: Samples, unit: str) -> None:
    medians = {name: f"{statistics.median(values):.4g}" for name, values in samples.items()}
    console.print(f"{what}, {unit}:", medians)


# ── decoding ─────────────────────────────────────────────────────────────────────────────────────


def decode(fleet: Fleet, rounds: int) -> list[Figure]:
    pages = Pages()
    rates = {shape: nothing() for shape in SHAPES}
    with ExitStack() as stack, console.status("decode") as status:
        servers = fleet.start_all(stack, "decode")
        for n in range(rounds):
            for shape, (lengths, _) in SHAPES.items():
                prompts = [pages.take(length) for length in lengths]
                for name in in_turn(n):
                    status.update(f"decode, round {n + 1} of {rounds}: {shape}, {name}")
                    streams = answered(
                        fleet, servers[name], f"{n}-{shape.replace(' ', '-')}", prompts
                    )
                    rates[shape][name].append(tokens_per_second(streams))
    return [made for shape in SHAPES for made in decode_figures(shape, rates[shape])]


def answered(fleet: Fleet, server: Server, agent: str, prompts: list[str]) -> list[Stream]:
    """All at once, each by an agent of its own, and then a rest."""
    streams = at_once(server, agent, prompts, NUM_DECODED, fleet.model)
    return [stream.wait_whole() for stream in streams]


def decode_figures(shape: str, rates: Samples) -> list[Figure]:
    tell(f"decoding, {shape}", rates, "tokens/s")
    peer = best(rates, most=True)
    target, ours = SHAPES[shape][1], rates["none"]
    name = f"decoding, {shape}: ours / theirs"
    return [
        figure(f"{name} ({peer})", ratios(ours, rates[peer]), target, at_least=True),
        figure(f"{name}, both 256", ratios(ours, rates["256"])),
        *(
            figure(
                f"decoding, {shape}: {b} bits / none", ratios(rates[b], ours), 0.65, at_least=True
            )
            for b in ("8", "4")
        ),
    ]


# ── gaps in a running stream ─────────────────────────────────────────────────────────────────────


def gaps(fleet: Fleet, rounds: int) -> list[Figure]:
    """Between the tokens of a running stream, while a long prompt or a long memory arrives."""
    pages = Pages()
    known = [pages.take(LONG_TOKENS) for _ in range(rounds)]
    with ExitStack() as stack, console.status("agents for the gaps"):
        for name in OURS:
            server = fleet.start(stack, name, "gaps")
            for n, prompt in enumerate(known):
                fleet.ask(server, f"known-{n}", prompt)
            stack.close()
    worst, restored = nothing(), {name: list[float]() for name in OURS}
    with ExitStack() as stack, console.status("gaps") as status:
        servers = fleet.start_all(stack, "gaps")
        for n in range(rounds):
            prompt = pages.take(LONG_TOKENS)
            for name in in_turn(n):
                status.update(f"gaps, round {n + 1} of {rounds}: {name}")
                seen, _ = while_arriving(fleet, servers[name], f"new-{n}", prompt)
                worst[name].append(1000 * max(seen))
                if name in OURS:
                    step = statistics.median(sorted(seen)[-FULL_STEPS:])
                    seen, cached = while_arriving(fleet, servers[name], f"known-{n}", known[n])
                    assert cached >= LONG_TOKENS - 100, f"only {cached} tokens from disk"
                    restored[name].append(max(seen) / step)
    tell("longest gap while a prompt arrives", worst, "ms")
    name = f"longest gap while {LONG_TOKENS} tokens arrive: ours / theirs"
    none = worst["none"]
    return [
        figure(f"{name}, default chunk ({THEIRS[0]})", ratios(none, worst[THEIRS[0]]), 0.25),
        *(figure(f"{name}, chunk {peer}", ratios(none, worst[peer])) for peer in THEIRS[1:]),
        *(
            figure(f"longest gap while as many are restored, kv {b} / full step", restored[b], 2)
            for b in OURS
        ),
    ]


def while_arriving(
    fleet: Fleet, server: Server, agent: str, prompt: str
) -> tuple[list[float], int]:
    """-> (seconds between the running stream's tokens, tokens of the prompt from memory)."""
    landed = landing(server, agent, ["Go on."], prompt, fleet.model)
    return landed.gaps, landed.arriving.wait_whole().cached_tokens


# ── memory ───────────────────────────────────────────────────────────────────────────────────────


def memory(fleet: Fleet, rounds: int) -> list[Figure]:
    """The most that ragged lengths add to the memory of a loaded model; servers of their own."""
    pages = Pages()
    rounds = min(rounds, MEMORY_ROUNDS)
    grown, pool = nothing(), {name: list[float]() for name in OURS}
    with console.status("memory") as status:
        for n in range(rounds):
            prompts = [pages.take(length) for length in RAGGED]
            for name in in_turn(n):
                status.update(f"memory, round {n + 1} of {rounds}: {name}")
                with ExitStack() as stack:
                    server = fleet.start(stack, name, f"memory-{n}")
                    grown[name].append(peak_growth(fleet, server, prompts) / 2**20)
                    if name in OURS:
                        pool[name].append(metric(server, "pool_bytes") / 2**20)
    tell("peak memory above the loaded model", grown, "MiB")
    tell("of this in the pool at the end", pool, "MiB")
    peer = best(grown, most=False)
    name = "peak memory, 8 ragged"
    return [
        *(
            figure(f"{name}: kv {b} / theirs ({peer})", ratios(grown[b], grown[peer]), 0.5)
            for b in OURS
        ),
        *(
            figure(f"{name}: kv none / theirs, chunk {other}", ratios(grown["none"], grown[other]))
            for other in THEIRS
            if other != peer
        ),
    ]


def peak_growth(fleet: Fleet, server: Server, prompts: list[str]) -> int:
    """Bytes.  What loading took for a moment is forgotten first."""
    Path(f"/proc/{server.pid}/clear_refs").write_text("5")
    before = peak_bytes(server)
    answered(fleet, server, "ragged", prompts)
    return peak_bytes(server) - before


def peak_bytes(server: Server) -> int:
    lines = Path(f"/proc/{server.pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


# ── prefill ──────────────────────────────────────────────────────────────────────────────────────


def prefill(fleet: Fleet, rounds: int) -> list[Figure]:
    pages = Pages()
    rates = {length: nothing() for length in PREFILL_TOKENS}
    with ExitStack() as stack, console.status("prefill") as status:
        servers = fleet.start_all(stack, "prefill")
        for n in range(rounds):
            for length in PREFILL_TOKENS:
                prompt = pages.take(length)
                for name in in_turn(n):
                    status.update(f"prefill, round {n + 1} of {rounds}: {length}, {name}")
                    answer = fleet.ask(servers[name], f"{n}-{length}", prompt)
                    computed = answer.prompt_tokens - answer.cached_tokens
                    assert answer.cached_tokens < 16, f"{answer.cached_tokens} tokens were known"
                    rates[length][name].append(computed / answer.first_token_s)
    return [made for length in PREFILL_TOKENS for made in prefill_figures(length, rates[length])]


def prefill_figures(length: int, rates: Samples) -> list[Figure]:
    tell(f"prefill of {length}", rates, "tokens/s")
    peer = best(rates, most=True)
    name = f"prefill of {length}"
    return [
        *(
            figure(
                f"{name}: kv {b} / theirs ({peer})",
                ratios(rates[b], rates[peer]),
                PREFILL_TARGET[b],
                at_least=True,
            )
            for b in OURS
        ),
        figure(f"{name}: kv none / theirs, both 256", ratios(rates["none"], rates["256"])),
    ]


PARTS: dict[str, Callable[[Fleet, int], list[Figure]]] = {
    "decode": decode,
    "gaps": gaps,
    "memory": memory,
    "prefill": prefill,
    "overhead": lambda fleet, rounds: overhead.measure(
        fleet.folder, Path(fleet.model.source), rounds
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description="How fast, and beside mlx_lm.server.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between them")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    wanted = args.only.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    blas.preload(os.environ)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        fleet = Fleet(Path(folder))
        for part in wanted:
            began = time.monotonic()
            figures += PARTS[part](fleet, args.rounds)
            console.print(f"{part} took {time.monotonic() - began:.0f} s")
    return report(figures, args.json)


if __name__ == "__main__":
    sys.exit(main())
