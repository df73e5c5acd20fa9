"""The part `pressure`: more agents than RAM holds, asked one after the other, lap after lap.

Ours may keep about a third of them in RAM; the rest comes back from disk.  `mlx_lm.server` runs
with its defaults, and once more with the same memory allowed for what it keeps.  Knows that
/v1/agents tells where our agents' tokens are.  Main thread.
"""

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from agent_memory.bench.bench import Bench, Mode, Part
from agent_memory.bench.measured import At
from agent_memory.bench.models import Model
from agent_memory.bench.servers import CHUNKS, Contender, MlxLm, Ours, Server, in_turn
from agent_memory.bench.streams import Message, Stream, assistant, user
from agent_memory.bench.texts import Pages
from agent_memory.errors import ServerFailed
from agent_memory.ops.agent_client import AgentClient

SHARE_IN_RAM = 1 / 3
ANSWER_TOKENS = 4
MIN_REMEMBERED = 0.5
"""Of the prompts' tokens, in laps after the first: with less, memory does not work."""
MIN_POOL_BYTES = 1 << 20  # a smaller one is not allowed
MB = 1e6

FIRST = "first token"
LONGEST = "longest wait for a first token"
REMEMBERED = "prompt tokens from memory"
RESIDENT = "resident memory, most"
REFUSED = "requests refused"
ALLOWED = "memory allowed for what is kept"
IN_RAM = "agents' tokens in RAM at the end"


@dataclass(frozen=True, slots=True)
class Sizes:
    """`tokens`: of each agent's first prompt."""

    agents: int
    tokens: int
    laps: int


SIZES: dict[Mode, Sizes] = {
    "quick": Sizes(6, 600, 2),
    "normal": Sizes(12, 1000, 3),
    "full": Sizes(24, 3000, 4),
}


@dataclass(slots=True)
class Lap:
    """All agents asked once.  `resident`: of the process after each answer, in bytes."""

    firsts: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    resident: list[int] = field(default_factory=list)
    refused: int = 0

    @property
    def remembered(self) -> float:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


class Talks:
    """What was said at one server so far, agent by agent, and how each lap went."""

    def __init__(self, server: Server, model: Model, prompts: Sequence[str]) -> None:
        self.server = server
        self.laps: list[Lap] = []
        self._model = model
        self._said: list[list[Message]] = [[user(prompt)] for prompt in prompts]

    def lap(self) -> None:
        lap = Lap()
        self.laps.append(lap)
        for i, said in enumerate(self._said):
            try:
                with self.server.stream(_name(i), said, ANSWER_TOKENS, self._model) as stream:
                    stream.wait()
            except (httpx.HTTPError, RuntimeError, ServerFailed):
                lap.refused += 1
                continue
            self._take(lap, said, stream)
        self.server.rest()

    def _take(self, lap: Lap, said: list[Message], stream: Stream) -> None:
        lap.firsts.append(stream.first_token_s)
        lap.prompt_tokens += int(stream.usage.get("prompt_tokens", 0))
        lap.cached_tokens += stream.cached_tokens
        lap.resident.append(self.server.resident_bytes)
        said += [assistant(stream.text), user("Go on.")]


def measure(bench: Bench) -> None:
    """Raises ServerFailed if ours refuses a request or does not remember."""
    assert bench.ours is not None, "not there elsewhere"
    sizes, model = SIZES[bench.mode], bench.models[0]
    bench.course.steps(3 + sizes.laps)
    with bench.course.step("how much an agent takes"):
        agent_bytes = bytes_of_an_agent(bench.ours, model, bench.pages, sizes)
    pool_bytes = max(MIN_POOL_BYTES, int(SHARE_IN_RAM * sizes.agents * agent_bytes))
    prompts = [bench.pages.take(sizes.tokens) for _ in range(sizes.agents)]
    with ExitStack() as stack:
        with bench.course.step("starting"):
            servers = start(bench, bench.ours, stack, model, pool_bytes)
            every = [Talks(server, model, prompts) for server in servers]
        for n in range(sizes.laps):
            with bench.course.step(f"lap {n + 1} of {sizes.laps}"):
                for talks in in_turn(every, n):
                    talks.lap()
        in_ram = share_in_ram(servers[0], sizes.agents)
    check(servers[0].name, every[0].laps, in_ram)
    at: At = {"agents": sizes.agents, "tokens": sizes.tokens}
    for talks in every:
        note(bench, at, talks)
    bench.notes.add(IN_RAM, at, "x", servers[0].name, in_ram, more_is_better=True)
    for server in servers:
        if server.name in (servers[0].name, same_memory(bench.folder, pool_bytes).name):
            bench.notes.add(ALLOWED, at, "MB", server.name, pool_bytes / MB)
    with bench.course.step("limits"):
        add_limits(bench, model, sizes, agent_bytes)


def bytes_of_an_agent(ours: Ours, model: Model, pages: Pages, sizes: Sizes) -> int:
    """Of one as long as those to come will be."""
    with ours.start([model], "pressure-one") as server, AgentClient(server.url) as client:
        server.ask(_name(0), pages.take(sizes.tokens), model, ANSWER_TOKENS)
        return int(client.agent(_name(0))["bytes"])


def start(
    bench: Bench, ours: Ours, stack: ExitStack, model: Model, pool_bytes: int
) -> list[Server]:
    """Ours first, each warmed by a short request."""
    others: list[Contender] = []
    for contender in bench.contenders[1:]:
        if not isinstance(contender, MlxLm):
            others.append(contender)
        elif contender.chunk == CHUNKS[0]:
            others += [contender, same_memory(bench.folder, pool_bytes)]
    first = ours.start([model], "pressure", "--pool-bytes", str(pool_bytes))
    servers = [stack.enter_context(first)]
    servers += [stack.enter_context(other.start([model], "pressure")) for other in others]
    for server in servers:
        server.ask("warmer", "Hello!", model)
    return servers


def same_memory(folder: Path, pool_bytes: int) -> MlxLm:
    """With as much for what it keeps as ours has."""
    flags = "--prompt-cache-bytes", str(pool_bytes)
    return MlxLm(folder, CHUNKS[0], flags, ", as much memory as ours")


def share_in_ram(server: Server, agents: int) -> float:
    with AgentClient(server.url) as client:
        each = [client.agent(_name(i)) for i in range(agents)]
    in_ram = sum(int(one["tiers"]["memory"]) for one in each)
    return in_ram / sum(int(one["tokens"]) for one in each)


def check(name: str, laps: Sequence[Lap], in_ram: float) -> None:
    """Of ours.  Raises ServerFailed."""
    refused = sum(lap.refused for lap in laps)
    if refused:
        raise ServerFailed(f"{name} refused {refused} requests.")
    least = min(lap.remembered for lap in laps[1:])
    if least < MIN_REMEMBERED:
        raise ServerFailed(f"{name} had only {least:.0%} of the prompts in memory.")
    if in_ram == 1:
        raise ServerFailed("All agents fit in RAM: nothing was under pressure.")


def note(bench: Bench, at: At, talks: Talks) -> None:
    """What is refused has no times: of a server that refuses, only that is noted."""
    add, name = bench.notes.add, talks.server.name
    refused = sum(lap.refused for lap in talks.laps)
    add(REFUSED, at, "requests", name, refused)
    for lap in talks.laps if not refused else []:
        at_lap = _at_lap(at, first=lap is talks.laps[0])
        add(FIRST, at_lap, "ms", name, 1000 * statistics.median(lap.firsts))
        add(LONGEST, at_lap, "ms", name, 1000 * max(lap.firsts))
        add(REMEMBERED, at_lap, "x", name, lap.remembered, more_is_better=True)
        add(RESIDENT, at_lap, "MB", name, max(lap.resident) / MB)


def add_limits(bench: Bench, model: Model, sizes: Sizes, agent_bytes: int) -> None:
    """A first lap computes each prompt; a later one reads what an agent has, and makes a step."""
    limits, at = bench.limits, {"agents": sizes.agents, "tokens": sizes.tokens}
    cold_s = limits.prefill_s(model, sizes.tokens)
    known_s = limits.read_s(agent_bytes) + limits.step_s(model, sizes.tokens)
    bench.notes.limit(FIRST, _at_lap(at, first=True), 1000 * cold_s)
    bench.notes.limit(FIRST, _at_lap(at, first=False), 1000 * known_s)


def _at_lap(at: At, *, first: bool) -> At:
    return {"lap": "first" if first else "later", **at}


def _name(number: int) -> str:
    return f"pressure-{number}"


PART = Part(
    "pressure", "More agents than RAM holds", measure, {"quick": 0, "normal": 40, "full": 300}
)
