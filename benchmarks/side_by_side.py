"""Ours beside mlx_lm.server in one run: cold, restored after a restart, while a prompt arrives.

    python -m benchmarks.side_by_side [--rounds 9] [--json FILE]

All servers run the built-in model in float32 with the same OpenBLAS, and the same chunk of prompt
tokens; they take turns, each text is new to all of them.  What is compared are ratios within the
run.  Exit status 1 if a target is missed.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from agent_memory.ops import blas
from agent_memory.ops.client import Client
from agent_memory.ops.process import ServerProcess
from benchmarks.figures import Figure, console, figure, ratios, report
from benchmarks.peers import MlxLmServer, float32_copy
from benchmarks.streams import Stream, gaps_between
from benchmarks.texts import texts

STEP_TOKENS = 256
CONTEXT_TOKENS = 1500
FULL_STEPS = CONTEXT_TOKENS // STEP_TOKENS
AGENTS = 5
SETTINGS = ("none", "8", "4")
COLD_TARGET = {"none": 1.15, "8": 1.3, "4": 1.3}
QUESTION = {"role": "user", "content": "What is my favorite color?"}


def ours(stack: ExitStack, folder: Path, kv_bits: str) -> ServerProcess:
    flags = ["--state-dir", str(folder / f"state-{kv_bits}"), "--kv-bits", kv_bits]
    flags += ["--step-tokens", str(STEP_TOKENS)]
    server = ServerProcess(flags, folder / f"log-{kv_bits}-{time.monotonic_ns()}")
    stack.enter_context(server).wait_loaded()
    return server


def first_token_ms(port: int, agent: str, messages: list[dict[str, str]]) -> tuple[float, int, str]:
    """-> (milliseconds to the first text, cached tokens, the answer)."""
    with Client(port) as client:
        answer = client.chat(agent, messages, max_tokens=16)
    return 1000 * answer.first_token_s, answer.cached_tokens, answer.text


def warm(port: int) -> None:
    first_token_ms(port, "warmer", [{"role": "user", "content": "Hello!"}])


def cold(folder: Path, rounds: int, text: Iterator[str]) -> list[Figure]:
    times: dict[str, list[float]] = {name: [] for name in ("mlx_lm.server", *SETTINGS)}
    with ExitStack() as stack:
        peer = stack.enter_context(
            MlxLmServer(float32_copy(folder / "float32"), STEP_TOKENS, folder / "log-peer")
        )
        ports = {"mlx_lm.server": peer.port}
        ports |= {bits: ours(stack, folder, bits).port for bits in SETTINGS}
        for port in ports.values():
            warm(port)
        for n in range(rounds):
            said = [{"role": "user", "content": next(text)}]
            names = list(ports)[n % len(ports) :] + list(ports)[: n % len(ports)]
            for name in names:
                ms, cached, _ = first_token_ms(ports[name], f"cold-{n}", said)
                assert cached < 16, f"{name} remembered {cached} tokens of a new text"
                times[name].append(ms)
    console.print({name: f"{statistics.median(ms):.0f} ms" for name, ms in times.items()})
    return [
        figure(
            f"cold first token, kv {bits}: ours / mlx_lm.server",
            ratios(times[bits], times["mlx_lm.server"]),
            COLD_TARGET[bits],
        )
        for bits in SETTINGS
    ]


def restored(folder: Path, kv_bits: str, text: Iterator[str]) -> list[Figure]:
    """Agents with long contexts; a restart, the same again; a restart, one more turn."""
    talks = {f"agent-{n}": [{"role": "user", "content": next(text)}] for n in range(AGENTS)}
    cold_ms, answers, _ = _ask_all(folder, kv_bits, talks)
    again_ms, _, again_cached = _ask_all(folder, kv_bits, talks)
    for agent, talk in talks.items():
        talk += [{"role": "assistant", "content": answers[agent]}, QUESTION]
    more_ms, _, more_cached = _ask_all(folder, kv_bits, talks)
    fewest = min(again_cached + more_cached)
    assert fewest >= CONTEXT_TOKENS - 100, f"only {fewest} tokens from memory"
    limit = statistics.median(cold_ms)
    return [
        made
        for name, times in (("same prompt", again_ms), ("one more turn", more_ms))
        for made in (
            figure(f"after a restart, {name}, kv {kv_bits}", times, 40, "ms"),
            figure(f"the same / cold, kv {kv_bits}", [ms / limit for ms in times], 1 / 20),
        )
    ]


def _ask_all(
    folder: Path, kv_bits: str, talks: dict[str, list[dict[str, str]]]
) -> tuple[list[float], dict[str, str], list[int]]:
    """A server started, warmed, asked by every agent in turn, and stopped."""
    times, answers, cached = [], {}, []
    with ExitStack() as stack:
        server = ours(stack, folder, kv_bits)
        warm(server.port)
        for agent, talk in talks.items():
            ms, from_memory, answers[agent] = first_token_ms(server.port, agent, talk)
            times.append(ms)
            cached.append(from_memory)
        assert server.stop().exit_code == 0
    return times, answers, cached


def gaps(folder: Path, kv_bits: str, text: Iterator[str]) -> list[Figure]:
    """A long prompt arrives while another answer is being streamed."""
    with ExitStack() as stack:
        port = ours(stack, folder, kv_bits).port
        warm(port)
        alone = [
            first_token_ms(port, f"alone-{n}", [{"role": "user", "content": next(text)}])[0]
            for n in range(3)
        ]
        longest, ratios = [], []
        for n in range(3):
            inside = _gaps_while_arriving(port, f"arriving-{n}", next(text))
            longest.append(max(inside) / statistics.median(alone))
            ratios.append(max(inside) / statistics.median(inside))
    return [
        figure(f"longest gap / median full step, kv {kv_bits}", ratios, 3),
        figure(f"longest gap / the prompt's prefill alone, kv {kv_bits}", longest, 1 / 3),
    ]


def _gaps_while_arriving(port: int, agent: str, text: str) -> list[float]:
    """Milliseconds between the running answer's tokens in the steps that computed the prompt."""
    with Stream(port, "repeating", "Repeat this:\n" + "0" * 100, 1500) as running:
        running.wait_for(50)
        began = time.monotonic()
        ms, _, _ = first_token_ms(port, agent, [{"role": "user", "content": text}])
    inside = [at for at in running.moments if began <= at <= began + ms / 1000]
    return [1000 * s for s in sorted(gaps_between(inside))[-FULL_STEPS:]]


def main() -> int:
    parser = argparse.ArgumentParser(description="Ours beside mlx_lm.server.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    blas.preload(os.environ)
    text = texts(CONTEXT_TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        figures = cold(Path(folder), args.rounds, text)
        for kv_bits in SETTINGS:
            with console.status(f"restart and gaps, kv {kv_bits}"):
                figures += restored(Path(folder), kv_bits, text)
                figures += gaps(Path(folder), kv_bits, text)
    return report(figures, args.json)


if __name__ == "__main__":
    sys.exit(main())
