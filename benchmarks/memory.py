"""What remembering costs and how fast it comes back: restoring, a restart, saving.

    python -m benchmarks.memory [--pairs 15] [--kv-bits none] [--json FILE]

A model of 57 million random parameters.  What is compared are times within the run.  Exit status 1
if a target is missed.
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

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from agent_memory.bench.models import random_model
from agent_memory.bench.texts import texts
from agent_memory.ops import blas
from agent_memory.ops.process import ServerProcess
from benchmarks.figures import Figure, console, figure, report

AGENTS = 5
RESTORED_TOKENS = 2000
LONG_TOKENS = 4000
DECODED_TOKENS = 300
PAIRS_OF_TWO = 3
"""Of one process and another: some are faster than others from their start to their end."""

Messages = list[dict[str, str]]


class Bench:
    """Servers on one model, and what is asked of them."""

    def __init__(self, folder: Path, kv_bits: str) -> None:
        self.folder = folder
        self.model = random_model(folder / "model")
        self.kv_bits = kv_bits

    def serve(self, stack: ExitStack, state: str, *more: str) -> ServerProcess:
        flags = ["--model", str(self.model), "--state-dir", str(self.folder / state)]
        flags += ["--kv-bits", self.kv_bits, *more]
        server = ServerProcess(flags, self.folder / f"log-{time.monotonic_ns()}")
        stack.enter_context(server).wait_loaded()
        ask(server.port, "warmer", said("Hello!"))
        return server


def said(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def ask(port: int, agent: str, messages: Messages, max_tokens: int = 1) -> tuple[float, int]:
    """-> (seconds until the whole answer is there, tokens from memory)."""
    body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    began = time.monotonic()
    answer = httpx.post(url, json=body, headers={"X-Agent-ID": agent}, timeout=600)
    seconds = time.monotonic() - began
    usage = answer.raise_for_status().json()["usage"]
    if max_tokens > 1:
        assert usage["completion_tokens"] == max_tokens, "the random model ended its turn"
    return seconds, usage["prompt_tokens_details"]["cached_tokens"]


def restore_seconds(port: int) -> float:
    """All restores of this server so far."""
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = families["agent_memory_restore_time_seconds"].samples
    return next(s.value for s in samples if s.name.endswith("_sum"))


def plain_seconds(files: list[Path]) -> float:
    """Reading these files one after the other and copying what they hold, with warm memory."""
    room = np.ones(sum(file.stat().st_size for file in files), np.uint8)
    copy, at = np.ones_like(room), 0
    began = time.monotonic()
    for file in files:
        with file.open("rb", buffering=0) as source:
            at += source.readinto(room[at:].data) or 0
    copy[:] = room
    return time.monotonic() - began


def restoring(bench: Bench, text: Iterator[str]) -> list[Figure]:
    """2,000 tokens from disk against plainly reading and copying the same files."""
    talks = {f"restored-{n}": said(next(text)) for n in range(AGENTS)}
    ratios = []
    with ExitStack() as stack:
        server = bench.serve(stack, "restoring")
        files = {agent: _files_of(bench, server, agent, talk) for agent, talk in talks.items()}
        server.stop()
        server = bench.serve(stack, "restoring")
        for agent, talk in talks.items():
            plain = min(plain_seconds(files[agent]) for _ in range(3))
            before = restore_seconds(server.port)
            _, cached = ask(server.port, agent, talk)
            assert cached >= RESTORED_TOKENS - 100, f"only {cached} tokens from memory"
            ratios.append((restore_seconds(server.port) - before) / plain)
        server.stop()
    name = f"restoring {RESTORED_TOKENS} tokens / reading and copying their files"
    return [figure(name, ratios, 2)]


def _files_of(bench: Bench, server: ServerProcess, agent: str, talk: Messages) -> list[Path]:
    """The block files that asking this leaves."""
    folder = bench.folder / "restoring" / "blocks"
    before = set(folder.glob("*/*"))
    ask(server.port, agent, talk)
    while True:
        [entry] = [
            a
            for a in httpx.get(f"http://127.0.0.1:{server.port}/v1/agents").json()["data"]
            if a["id"] == agent
        ] or [None]
        if entry and entry["tiers"]["disk"] == entry["tokens"]:
            return sorted(set(folder.glob("*/*")) - before)
        time.sleep(0.05)


def returning(bench: Bench, text: Iterator[str]) -> list[Figure]:
    """The first token of a 4,000-token agent: after a restart against from RAM."""
    talks = {f"long-{n}": said(next(text) + next(text)) for n in range(AGENTS)}
    with ExitStack() as stack:
        server = bench.serve(stack, "returning")
        for agent, talk in talks.items():
            ask(server.port, agent, talk)
        in_ram = [ask(server.port, agent, talk) for agent, talk in talks.items()]
        server.stop()
        server = bench.serve(stack, "returning")
        restarted = [ask(server.port, agent, talk) for agent, talk in talks.items()]
        server.stop()
    fewest = min(cached for _, cached in in_ram + restarted)
    assert fewest >= LONG_TOKENS - 200, f"only {fewest} tokens from memory"
    ram = statistics.median(seconds for seconds, _ in in_ram)
    console.print(f"first token of {fewest} tokens from RAM: {1000 * ram:.0f} ms")
    return [figure("first token after a restart / from RAM", [s / ram for s, _ in restarted], 1.3)]


def saving(bench: Bench, text: Iterator[str], pairs: int) -> list[Figure]:
    """Decoding while everything is saved against decoding on a day whose writes are used up."""
    ratios: list[float] = []
    while len(ratios) < pairs:
        ratios += _pairs(bench, text, len(ratios), min(PAIRS_OF_TWO, pairs - len(ratios)))
    low, high = interval(ratios)
    middle = statistics.median(ratios)
    console.print(f"saving: {middle:.3f}, 95 % interval {low:.3f} to {high:.3f}, {pairs} pairs")
    return [Figure("decoding with saving / without, lower end", low, 1.02, (low, high))]


def _pairs(bench: Bench, text: Iterator[str], done: int, count: int) -> list[float]:
    """Of two servers that were started for them."""
    with ExitStack() as stack:
        ports = {
            "saved": bench.serve(stack, f"saved-{done}", "--daily-write-bytes", "none").port,
            "not saved": bench.serve(stack, f"not-saved-{done}", "--daily-write-bytes", "1M").port,
        }
        for port in ports.values():
            ask(port, "first", said(next(text)))  # the 1 MB
        ratios = []
        for n in range(done, done + count):
            talk = said(f"{n} {next(text)[:400]}")
            order = list(ports)[:: -1 if n % 2 else 1]
            took = {way: ask(ports[way], f"pair-{n}", talk, DECODED_TOKENS)[0] for way in order}
            ratios.append(took["saved"] / took["not saved"])
    return ratios


def interval(values: list[float]) -> tuple[float, float]:
    """A 95 % interval of the median, from 10,000 samples with replacement."""
    random = np.random.default_rng(0)
    medians = np.median(random.choice(values, (10_000, len(values))), axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return float(low), float(high)


def main() -> int:
    parser = argparse.ArgumentParser(description="What remembering costs.")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--kv-bits", default="none", choices=("none", "8", "4"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    blas.preload(os.environ)
    text = texts(RESTORED_TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.kv_bits)
        figures = []
        with console.status("restoring"):
            figures += restoring(bench, text)
        with console.status("a restart"):
            figures += returning(bench, text)
        with console.status("saving"):
            figures += saving(bench, text, args.pairs)
    return report(figures, args.json)


if __name__ == "__main__":
    sys.exit(main())
