"""The part `growth`: how costs grow with the context, with agents, and with blocks on disk.

With the context all servers are compared; agents and blocks others do not have.  Knows where our
block files are.  Main thread.
"""

import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass

from agent_memory.bench import block_files
from agent_memory.bench.bench import Bench, Mode, Part
from agent_memory.bench.measured import At
from agent_memory.bench.models import Model
from agent_memory.bench.servers import Ours, Server, in_turn, metric, start_all
from agent_memory.bench.streams import Stream, gaps_between
from agent_memory.errors import ServerFailed
from agent_memory.ops.agent_client import AgentClient

NEW, KNOWN = "first token, new prompt", "first token, restored"
STEP = "decode step"
LIST, TURN = "GET /v1/agents", "first token of a known agent"
START, FINDS = "start", "start that finds files its index does not name"

DECODED = 32
AT_ONCE = 8
"""Agents that are made side by side."""
KNOWN_TOKENS = 500
"""Of the agent that is restored beside ever more blocks."""
MIN_REMEMBERED = 0.9


@dataclass(frozen=True, slots=True)
class Sizes:
    """What to grow: tokens of a context, agents, blocks on disk."""

    rounds: int
    contexts: tuple[int, ...]
    agents: tuple[int, ...]
    blocks: tuple[int, ...]


SIZES: dict[Mode, Sizes] = {
    "quick": Sizes(1, (512, 1024), (10, 50), (100, 500)),
    "normal": Sizes(2, (512, 2048), (10, 100), (100, 1000, 5000)),
    "full": Sizes(3, (512, 1024, 2048, 4096, 8000), (10, 100, 1000), (100, 1000, 5000, 20_000)),
}


def measure(bench: Bench) -> None:
    """Raises ServerFailed if ours does not remember."""
    assert bench.ours is not None, "not there elsewhere"
    sizes = SIZES[bench.mode]
    bench.course.steps(
        1 + len(sizes.contexts) + 2 * sizes.rounds + len(sizes.agents) + len(sizes.blocks) + 1
    )
    endless = next((model for model in bench.models if model.endless), bench.models[0])
    agent_bytes = contexts(bench, bench.ours, endless, sizes)
    agents(bench, bench.ours, bench.models[0], sizes)
    blocks(bench, bench.ours, bench.models[0], sizes)
    with bench.course.step("limits"):
        add_limits(bench, endless, agent_bytes)


# ── with the context ─────────────────────────────────────────────────────────────────────────────


def contexts(bench: Bench, ours: Ours, model: Model, sizes: Sizes) -> dict[int, int]:
    """-> the bytes on disk of ours at each length."""
    prompts = {length: bench.pages.take(length) for length in sizes.contexts}
    with ExitStack() as stack:
        with bench.course.step("starting"):
            servers = start_all(stack, bench.contenders, [model], "growth")
            for server in servers.values():
                server.ask("warmer", "Hello!", model)
        for i, (length, prompt) in enumerate(prompts.items()):
            with bench.course.step(f"{length} tokens, new"):
                for server in in_turn(list(servers.values()), i):
                    answer = server.ask(f"long-{length}", prompt, model)
                    _note(bench, NEW, {"tokens": length}, server.name, answer.first_token_s)
        for n in range(sizes.rounds):
            with bench.course.step(f"again from RAM, {n + 1} of {sizes.rounds}"):
                for length, prompt in prompts.items():
                    for server in in_turn(list(servers.values()), n):
                        _again(bench, server, model, length, prompt)
        with AgentClient(servers[ours.name].url) as client:
            num_bytes = {length: int(client.agent(f"long-{length}")["bytes"]) for length in prompts}
    for n in range(sizes.rounds):
        with bench.course.step(f"again from disk, {n + 1} of {sizes.rounds}"):
            _from_disk(bench, ours, model, prompts)
    return num_bytes


def _again(bench: Bench, server: Server, model: Model, length: int, prompt: str) -> None:
    answer = server.ask(f"long-{length}", prompt, model, DECODED)
    at: At = {"tokens": length, "from": "RAM"}
    _note(bench, KNOWN, at, server.name, answer.first_token_s)
    if gaps := gaps_between(answer.moments):
        _note(bench, STEP, {"tokens": length}, server.name, statistics.median(gaps))


def _from_disk(bench: Bench, ours: Ours, model: Model, prompts: dict[int, str]) -> None:
    """Each once, by a process that has none of them in RAM yet."""
    with ours.start([model], "growth") as server:
        server.ask("warmer", "Hello!", model)
        for length, prompt in prompts.items():
            answer = _restored(server.ask(f"long-{length}", prompt, model))
            at: At = {"tokens": length, "from": "disk, after a restart"}
            _note(bench, KNOWN, at, server.name, answer.first_token_s)


def _restored(answer: Stream) -> Stream:
    """Raises ServerFailed if it is not."""
    if answer.cached_tokens < MIN_REMEMBERED * answer.prompt_tokens:
        found = f"{answer.cached_tokens} of {answer.prompt_tokens}"
        raise ServerFailed(f"Only {found} tokens of a known prompt came from memory.")
    return answer


def add_limits(bench: Bench, model: Model, agent_bytes: dict[int, int]) -> None:
    limits = bench.limits
    for one in bench.notes:
        length = one.at.get("tokens")
        if one.name == START:
            one.limit = limits.load_s(bench.models[0])
        elif isinstance(length, int) and one.name == NEW:
            one.limit = 1000 * limits.prefill_s(model, length)
        elif isinstance(length, int):
            from_disk = str(one.at.get("from")).startswith("disk")
            read_s = limits.read_s(agent_bytes[length]) if from_disk else 0
            one.limit = 1000 * (read_s + limits.step_s(model, length))


# ── with agents ──────────────────────────────────────────────────────────────────────────────────


def agents(bench: Bench, ours: Ours, model: Model, sizes: Sizes) -> None:
    """Short ones: what is asked of them costs as little as can be, whatever their number."""
    made = 0
    with ours.start([model], "growth-agents") as server, AgentClient(server.url) as client:
        for count in sizes.agents:
            with bench.course.step(f"{count} agents"):
                make(server, model, range(made, count))
                made = count
                server.rest()
                for n in range(sizes.rounds):
                    began = time.monotonic()
                    assert len(client.agents()) == count
                    at = {"agents": count}
                    _note(bench, LIST, at, server.name, time.monotonic() - began)
                    known = server.ask(_name(n), _greeting(n), model)
                    _note(bench, TURN, at, server.name, known.first_token_s)


def make(server: Server, model: Model, numbers: range) -> None:
    for at in range(numbers.start, numbers.stop, AT_ONCE):
        with ExitStack() as stack:
            some = range(at, min(at + AT_ONCE, numbers.stop))
            streams = [server.stream(_name(n), _greeting(n), 1, model) for n in some]
            for stream in map(stack.enter_context, streams):
                stream.wait()


def _name(number: int) -> str:
    return f"short-{number}"


def _greeting(number: int) -> str:
    return f"I am number {number}. Hello!"


# ── with blocks on disk ──────────────────────────────────────────────────────────────────────────


def blocks(bench: Bench, ours: Ours, model: Model, sizes: Sizes) -> None:
    """They belong to nobody; one agent, the same at every number, is restored beside them."""
    prompt = bench.pages.take(KNOWN_TOKENS)
    with ours.start([model], "growth-blocks") as server:
        server.ask("known", prompt, model)
        server.ask("pattern", "Hello!", model)
    folder = ours.folder / "state-growth-blocks" / "blocks"
    like = block_files.smallest(folder)
    made = 0
    for count in sizes.blocks:
        at = {"blocks": count}
        with bench.course.step(f"{count} blocks"):
            block_files.add(folder, like, range(made, count))
            _find(bench, ours, model, count - made, count * like.stat().st_size)
            made = count
            for _ in range(sizes.rounds):
                with ours.start([model], "growth-blocks") as server:
                    bench.notes.add(START, at, "s", server.name, server.started_s)
                    answer = _restored(server.ask("known", prompt, model))
                    _note(bench, TURN, at, server.name, answer.first_token_s)
                    server.stop()


def _find(bench: Bench, ours: Ours, model: Model, files: int, least: int) -> None:
    """So many new ones, which this start reads and the next ones do not.  `least`: bytes of all."""
    with ours.start([model], "growth-blocks") as server:
        bench.notes.add(FINDS, {"files": files}, "s", server.name, server.started_s)
        found = metric(server, "disk_bytes")
        if found < least:
            raise ServerFailed(f"Of {least} bytes in block files only {found:.0f} were taken.")
        server.stop()


def _note(bench: Bench, name: str, at: At, server: str, seconds: float) -> None:
    bench.notes.add(name, at, "ms", server, 1000 * seconds)


PART = Part("growth", "How costs grow", measure, {"quick": 0, "normal": 0, "full": 900})
