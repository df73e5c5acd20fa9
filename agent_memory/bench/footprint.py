"""The part `memory`: what an agent's memory takes in RAM and on disk, and how many fit.

Agents of the same length are asked one after the other, each with a text of its own, until the
first is no longer in RAM.  Knows /v1/agents, how our state directory lies on disk, and the flags
that both servers have for this.  Main thread.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agent_memory.bench.bench import Bench, Mode, Part
from agent_memory.bench.limits import KV
from agent_memory.bench.models import Model
from agent_memory.bench.servers import CHUNKS, MlxLm, Ours, Server
from agent_memory.errors import ServerFailed
from agent_memory.ops import backend
from agent_memory.ops.agent_client import AgentClient

NAME = "memory"
FULL_AGENTS = 3.5
"""The budget holds so many with K and V as the model computes them, and nothing else."""
MEGABYTE = 1 << 20
MOST_AGENTS = 100
GROWN_BY = 8
"""Agents; fewer than the prompts that `mlx_lm.server` keeps unless told otherwise."""
SCALES = {"none": 1.0, "8": 1.125, "4": 1.25}
"""About how much more K and V take with their scales; where to begin to look."""
WRITTEN_S = 60.0
POLL_S = 0.02

Point = tuple[int, int]
"""Tokens kept so far, resident bytes by then."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """`bits`: of ours, for one model after the other.  `theirs`: of `mlx_lm.server`, likewise."""

    agent_tokens: int
    bits: Sequence[Sequence[str]]
    theirs: Sequence[Sequence[str]]


ALL = ("none", "8", "4")
SIZES: dict[Mode, Sizes] = {
    "quick": Sizes(500, (ALL,), (("none",),)),
    "normal": Sizes(500, (ALL, ("8",)), (("none", "8"), ("none",))),
    "full": Sizes(1000, (ALL, ALL), (ALL, ALL)),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One model whose K and V are kept in so many bits.  `number`: of the model."""

    number: int
    model: Model
    bits: str
    kv: KV
    tokens: int

    @property
    def at(self) -> dict[str, str | int]:
        return {"model": self.model.name, "kv_bits": self.bits}

    @property
    def at_budget(self) -> dict[str, str | int]:
        return {**self.at, "tokens": self.tokens, "budget_bytes": self.budget}

    @property
    def token_bytes(self) -> float:
        """K and V alone, without the scales that quantized values need."""
        return self.kv.values * (self.kv.bits if self.bits == "none" else int(self.bits)) / 8

    @property
    def budget(self) -> int:
        """Of RAM, in whole megabytes; the same for each number of bits."""
        full = self.kv.values * self.kv.bits / 8
        return max(round(FULL_AGENTS * self.tokens * full / MEGABYTE), 1) * MEGABYTE


def measure(bench: Bench) -> None:
    assert bench.ours is not None
    sizes = SIZES[bench.mode]
    numbered = [(n, m, kv) for n, m in enumerate(bench.models) if (kv := bench.limits.kv(m)).values]
    mine, theirs = (
        [
            Case(n, model, bits, kv, sizes.agent_tokens)
            for (n, model, kv), of_one in zip(numbered, all_bits, strict=False)
            for bits in of_one
        ]
        for all_bits in (sizes.bits, sizes.theirs)
    )
    bench.course.steps(max(len(mine) + len(theirs), 1))
    for case in mine:
        with bench.course.step(f"{case.model.name}, {case.bits} bits"):
            of_ours(bench, bench.ours, case)
    for case in theirs:
        with bench.course.step(f"{case.model.name}, {case.bits} bits, mlx_lm.server"):
            of_theirs(bench, case)


def of_ours(bench: Bench, ours: Ours, case: Case) -> None:
    state, points = f"{NAME}-{case.number}-{case.bits}", []
    flags = ["--kv-bits", case.bits, "--pool-bytes", str(case.budget)]
    flags += ["--daily-write-bytes", "none"]
    with ours.start([case.model], state, *flags) as server, AgentClient(server.url) as client:
        agents = []
        for number in range(MOST_AGENTS):
            agents.append(_asked(bench, server, client, case, number))
            if number and not _in_ram(client.agent(_agent(0))):
                break
            points.append((_tokens(agents), server.resident_bytes))
        server.stop()
    notes, tokens = bench.notes, _tokens(agents)
    files = ours.state_dir(state).rglob("*")
    found = {
        "kept per token": sum(agent["bytes"] for agent in agents),
        "on disk per token": sum(file.stat().st_size for file in files if file.is_file()),
        "written per token": sum(agent["bytes_written"] for agent in agents),
    }
    for name, num_bytes in found.items():
        notes.add(name, case.at, "B", ours.name, num_bytes / tokens)
        notes.limit(name, case.at, case.token_bytes)
    _note_growth(bench, ours.name, case, points)
    _note_fitting(bench, ours.name, case, len(points))


def of_theirs(bench: Bench, case: Case) -> None:
    """With its own flags for the same number of bits, the quantizing from the first token on."""
    flags: tuple[str, ...] = ()
    if case.bits != "none":
        flags = ("--kv-bits", case.bits, "--quantized-kv-start", "0")
    name = MlxLm(bench.folder, CHUNKS[0]).name
    points: list[Point] = []
    with MlxLm(bench.folder, CHUNKS[0], flags).start([case.model], NAME) as server:
        tokens = 0
        for number in range(GROWN_BY):
            text = bench.pages.take(case.tokens)
            with server.stream(_agent(number), text, 1, case.model) as stream:
                tokens += stream.wait().prompt_tokens
            points.append((tokens, server.resident_bytes))
    _note_growth(bench, name, case, points)
    flags += ("--prompt-cache-bytes", str(case.budget), "--prompt-cache-size", str(MOST_AGENTS))
    with MlxLm(bench.folder, CHUNKS[0], flags).start([case.model], NAME) as server:
        _note_fitting(bench, name, case, _num_cached(bench, server, case))


def _num_cached(bench: Bench, server: Server, case: Case) -> int:
    """How many can be asked one after the other with the first of them still in mind."""

    def are_kept(count: int) -> bool:
        texts = [bench.pages.take(case.tokens) for _ in range(count)]
        for number, text in enumerate([*texts, texts[0]]):
            with server.stream(_agent(number), text, 1, case.model) as stream:
                stream.wait()
        return stream.cached_tokens > stream.prompt_tokens / 2

    count = int(case.budget / case.tokens / case.token_bytes / SCALES[case.bits])
    if are_kept(max(count, 1)):
        while are_kept(count + 1):
            count += 1
        return count
    while count > 1 and not are_kept(count - 1):
        count -= 1
    return max(count - 1, 0)


def _note_growth(bench: Bench, name: str, case: Case, points: Sequence[Point]) -> None:
    """Left out where a GPU computes: what it keeps is not in a process's resident bytes."""
    steady = points[1:]  # the first brings what is needed once
    if backend.find() != "cpu" or len(steady) < 2:
        return
    tokens, resident = zip(*steady, strict=True)
    grown = statistics.linear_regression(tokens, resident).slope
    bench.notes.add("resident per token", case.at, "B", name, grown)
    bench.notes.limit("resident per token", case.at, case.token_bytes)


def _note_fitting(bench: Bench, name: str, case: Case, count: int) -> None:
    what, at = "agents in RAM", case.at_budget
    bench.notes.add(what, at, "agents", name, count, more_is_better=True)
    bench.notes.limit(what, at, case.budget / case.tokens / case.token_bytes)


def _asked(
    bench: Bench, server: Server, client: AgentClient, case: Case, number: int
) -> dict[str, Any]:
    """The agent as /v1/agents tells of it, all of it written."""
    text = bench.pages.take(case.tokens)
    with server.stream(_agent(number), text, 1, case.model) as stream:
        stream.wait()
    deadline = time.monotonic() + WRITTEN_S
    while time.monotonic() < deadline:
        there = [agent for agent in client.agents() if agent["id"] == _agent(number)]
        if there and there[0]["tiers"]["disk"] == there[0]["tokens"]:
            return there[0]
        time.sleep(POLL_S)
    raise ServerFailed(f"What it remembers was not on the disk after {WRITTEN_S:.0f} s.")


def _agent(number: int) -> str:
    return f"agent-{number}"


def _in_ram(agent: dict[str, Any]) -> bool:
    return bool(agent["tiers"]["memory"] == agent["tokens"])


def _tokens(agents: Sequence[dict[str, Any]]) -> int:
    return sum(agent["tokens"] for agent in agents)


PART = Part(NAME, "Memory", measure, {"quick": 18, "normal": 45, "full": 200})
