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

from agent_memory.bench.models import Model, float32_copy
from agent_memory.bench.servers import MlxLm, in_turn
from agent_memory.bench.streams import Message, Stream, assistant, gaps_between, user
from agent_memory.bench.texts import texts
from agent_memory.ops import blas
from agent_memory.ops.process import ServerProcess
from benchmarks.figures import Figure, console, figure, ratios, report

STEP_TOKENS = 256
CONTEXT_TOKENS = 1500
FULL_STEPS = CONTEXT_TOKENS // STEP_TOKENS
AGENTS = 5
SETTINGS = ("none", "8", "4")
COLD_TARGET = {"none": 1.15, "8": 1.3, "4": 1.3}
QUESTION = user("What is my favorite color?")


def ours(stack: ExitStack, folder: Path, kv_bits: str) -> ServerProcess:
    flags = ["--state-dir", str(folder / f"state-{kv_bits}"), "--kv-bits", kv_bits]
    flags += ["--step-tokens", str(STEP_TOKENS)]
    server = ServerProcess(flags, folder / f"log-{kv_bits}-{time.monotonic_ns()}")
    stack.enter_context(server).wait_loaded()
    return server


def url_of(server: ServerProcess) -> str:
    return f"http://127.0.0.1:{server.port}"


def first_token_ms(url: str, agent: str, messages: list[Message]) -> tuple[float, int, str]:
    """-> (milliseconds to the first text, cached tokens, the answer)."""
    with Stream(url, agent, messages, 16) as answer:
        answer.wait()
    return 1000 * answer.first_token_s, answer.cached_tokens, answer.text


def warm(url: str) -> None:
    first_token_ms(url, "warmer", [user("Hello!")])


def cold(folder: Path, rounds: int, text: Iterator[str]) -> list[Figure]:
    times: dict[str, list[float]] = {name: [] for name in ("mlx_lm.server", *SETTINGS)}
    with ExitStack() as stack:
        builtin = Model("builtin", str(float32_copy(folder / "float32")))
        peer = stack.enter_context(MlxLm(folder, STEP_TOKENS).start([builtin], "peer"))
        urls = {"mlx_lm.server": peer.url}
        urls |= {bits: url_of(ours(stack, folder, bits)) for bits in SETTINGS}
        for url in urls.values():
            warm(url)
        for n in range(rounds):
            said = [user(next(text))]
            for name in in_turn(list(urls), n):
                ms, cached, _ = first_token_ms(urls[name], f"cold-{n}", said)
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
    talks = {f"agent-{n}": [user(next(text))] for n in range(AGENTS)}
    cold_ms, answers, _ = _ask_all(folder, kv_bits, talks)
    again_ms, _, again_cached = _ask_all(folder, kv_bits, talks)
    for agent, talk in talks.items():
        talk += [assistant(answers[agent]), QUESTION]
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
    folder: Path, kv_bits: str, talks: dict[str, list[Message]]
) -> tuple[list[float], dict[str, str], list[int]]:
    """A server started, warmed, asked by every agent in turn, and stopped."""
    times, answers, cached = [], {}, []
    with ExitStack() as stack:
        server = ours(stack, folder, kv_bits)
        warm(url_of(server))
        for agent, talk in talks.items():
            ms, from_memory, answers[agent] = first_token_ms(url_of(server), agent, talk)
            times.append(ms)
            cached.append(from_memory)
        assert server.stop().exit_code == 0
    return times, answers, cached


def gaps(folder: Path, kv_bits: str, text: Iterator[str]) -> list[Figure]:
    """A long prompt arrives while another answer is being streamed."""
    with ExitStack() as stack:
        url = url_of(ours(stack, folder, kv_bits))
        warm(url)
        alone = [first_token_ms(url, f"alone-{n}", [user(next(text))])[0] for n in range(3)]
        longest, ratios = [], []
        for n in range(3):
            inside = _gaps_while_arriving(url, f"arriving-{n}", next(text))
            longest.append(max(inside) / statistics.median(alone))
            ratios.append(max(inside) / statistics.median(inside))
    return [
        figure(f"longest gap / median full step, kv {kv_bits}", ratios, 3),
        figure(f"longest gap / the prompt's prefill alone, kv {kv_bits}", longest, 1 / 3),
    ]


def _gaps_while_arriving(url: str, agent: str, text: str) -> list[float]:
    """Milliseconds between the running answer's tokens in the steps that computed the prompt."""
    with Stream(url, "repeating", "Repeat this:\n" + "0" * 100, 1500) as running:
        running.wait_for(50)
        began = time.monotonic()
        ms, _, _ = first_token_ms(url, agent, [user(text)])
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
