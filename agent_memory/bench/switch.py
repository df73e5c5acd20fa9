"""The part `switch`: what it costs to change the model, hot and by a restart.

Agents with long prompts have been at each of the models, one after the other.  Then the model
changes, and all of them say the same again, each when the one before has its answer:

    hot        a process that has both models is asked for the other, and back
    restart    the process ends; another starts, with one model alone, and then with the other

So whoever remembers has what it remembers from one and the same time.  `back at work`: from when
the change was asked for until the last agent has its first token.  `load` and `start`: until
something short is answered, before any agent asks; some servers load only then.  Main thread.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import httpx

from agent_memory.bench.agents import kept
from agent_memory.bench.bench import Bench, Mode, Part
from agent_memory.bench.measured import At
from agent_memory.bench.models import Model, check_contexts
from agent_memory.bench.servers import Contender, Ended, Ours, Peer, Server, in_turn
from agent_memory.bench.streams import Stream
from agent_memory.block import BLOCK_TOKENS
from agent_memory.errors import ServerFailed
from agent_memory.ops.machine import Machine
from agent_memory.processes import start_of

ANSWER_TOKENS = 4
HELLO_TOKENS = 8
MB = 1e6
EACH = "first token, median of agents"


@dataclass(frozen=True, slots=True)
class Sizes:
    """`agents` at each model, each with a prompt of about so many `tokens`."""

    agents: int
    tokens: int
    rounds: int


SIZES: dict[Mode, Sizes] = {
    "quick": Sizes(2, 600, 1),
    "normal": Sizes(3, 800, 2),
    "full": Sizes(8, 4000, 3),
}

Prompts = Mapping[str, str]
"""By the agent's name."""


@dataclass(frozen=True, slots=True)
class Visit:
    """All agents of a model have asked.  `seconds`: until the last of them had its first token."""

    seconds: float
    answers: Sequence[Stream]

    @property
    def first_tokens_ms(self) -> list[float]:
        return [1000 * answer.first_token_s for answer in self.answers]

    @property
    def cached_tokens(self) -> int:
        return sum(answer.cached_tokens for answer in self.answers)


@dataclass(slots=True)
class Known:
    """What limits are made of, by the model's name: of an agent of ours, bytes and tokens."""

    num_bytes: dict[str, int] = field(default_factory=dict)
    num_tokens: dict[str, int] = field(default_factory=dict)


def measure(bench: Bench) -> None:
    measure_sizes(bench, SIZES[bench.mode])


def measure_sizes(bench: Bench, sizes: Sizes) -> None:
    models = bench.models[:2]
    check_contexts(models, sizes.tokens + BLOCK_TOKENS)
    bench.course.steps(3 * sizes.rounds * len(bench.contenders) + 1)
    known, of_one_model = Known(), set[str]()
    for number in range(sizes.rounds):
        prompts = {
            model.name: {
                f"switch-{number}-{place}-{n}": bench.pages.take(sizes.tokens)
                for n in range(sizes.agents)
            }
            for place, model in enumerate(models)
        }
        for contender in in_turn(bench.contenders, number):
            wanted = models[:1] if contender.name in of_one_model else models
            reached = Turn(bench, contender, prompts, sizes, known).measure(wanted)
            if len(reached) < len(wanted):
                if number:  # rounds are compared in pairs
                    raise ServerFailed(f"{contender.name} took another model once, and not now.")
                of_one_model.add(contender.name)
    with bench.course.step("limits"):
        _limits(bench, models, sizes, known)


@dataclass(slots=True)
class Turn:
    """One contender's part of a round."""

    bench: Bench
    contender: Contender
    prompts: Mapping[str, Prompts]
    sizes: Sizes
    known: Known

    def measure(self, models: Sequence[Model]) -> Sequence[Model]:
        """Those that it could be asked for, by name and without a restart."""
        name, step = self.contender.name, self.bench.course.step
        with ExitStack() as stack:
            with step(f"{name}, agents new to it"):
                server = stack.enter_context(self.contender.start(models, "switch"))
                models = self._first_visits(server, models)
            with step(f"{name}, hot"):
                for model in models if len(models) > 1 else ():
                    self._hot(server, model)
            with step(f"{name}, by restart"):
                for model in models:
                    server = self._restart(stack, server, model)
        return models

    def _first_visits(self, server: Server, models: Sequence[Model]) -> Sequence[Model]:
        """Those where the agents have been: without the second, where a server has but one."""
        first = _hello(server, models[0])
        self._first_visit(server, models[0])
        if len(models) == 1:
            return models
        try:
            other = _hello(server, models[1])
        except (httpx.HTTPError, RuntimeError, ServerFailed):
            if not isinstance(self.contender, Peer):
                raise
            return models[:1]
        if isinstance(self.contender, Peer) and other.text == first.text:
            return models[:1]  # it does not look at the name
        self._first_visit(server, models[1])
        return models

    def _first_visit(self, server: Server, model: Model) -> None:
        visit = self._all_ask(server, model)
        server.rest()
        at = _at("first visit", model, self.sizes)
        median = statistics.median(visit.first_tokens_ms)
        self._note(EACH, at, "ms", median)
        if isinstance(self.contender, Ours):
            files = [kept(server, agent).num_bytes for agent in self.prompts[model.name]]
            self.known.num_bytes[model.name] = round(statistics.median(files))
            self.known.num_tokens[model.name] = visit.answers[0].prompt_tokens

    def _hot(self, server: Server, model: Model) -> None:
        at, before = _at("hot", model, self.sizes), server.resident_bytes
        loaded_s = _hello(server, model).first_token_s
        visit = self._all_ask(server, model)
        self._note("load", at, "s", loaded_s)
        self._note_visit(at, visit, loaded_s + visit.seconds, before, server)

    def _restart(self, stack: ExitStack, server: Server, model: Model) -> Server:
        """-> the server that runs now."""
        at, before = _at("restart", model, self.sizes), server.resident_bytes
        self._note_stop(at, ended := self._stop(at, server))
        began = time.monotonic()
        server = stack.enter_context(self.contender.start([model], "switch"))
        started_s = _hello(server, model).moments[0] - began
        visit = self._all_ask(server, model)
        self._note("start", at, "s", started_s)
        total = ended.seconds + started_s + visit.seconds
        self._note_visit(at, visit, total, before, server)
        return server

    def _stop(self, at: At, server: Server) -> Ended:
        pid, machine = server.pid, Machine()
        before = machine.memory
        ended = server.stop()
        after = machine.memory
        if isinstance(self.contender, Ours) and (ended.exit_code or not ended.port_free):
            raise ServerFailed(
                f"agent-memory ended with {ended.exit_code}, its port "
                f"{'free' if ended.port_free else 'still taken'}; 0 and free were to be expected."
            )
        if start_of(pid):
            raise ServerFailed(f"{self.contender.name} has ended and process {pid} is still there.")
        if before and after:
            freed = after.available - before.available
            self._note("memory free again after the stop", at, "MB", freed / MB, more=True)
        if before and after and before.wired is not None and after.wired is not None:
            unwired = before.wired - after.wired
            self._note("wired memory free again after the stop", at, "MB", unwired / MB, more=True)
        return ended

    def _note_stop(self, at: At, ended: Ended) -> None:
        self._note("stop", at, "s", ended.seconds)
        for stage, seconds in ended.stages.items():
            self._note("stage of the stop", {**at, "stage": stage}, "s", seconds)

    def _note_visit(
        self, at: At, visit: Visit, total_s: float, before: int, server: Server
    ) -> None:
        """Also waits for the server to rest."""
        self._check(at, visit)
        first_ms, median_ms = visit.first_tokens_ms[0], statistics.median(visit.first_tokens_ms)
        self._note("first token", at, "ms", first_ms)
        self._note(EACH, at, "ms", median_ms)
        self._note("back at work", at, "s", total_s)
        self._note("tokens restored", at, "tokens", visit.cached_tokens, more=True)
        server.rest()
        self._note("memory before", at, "MB", before / MB)
        self._note("memory after", at, "MB", server.resident_bytes / MB)

    def _check(self, at: At, visit: Visit) -> None:
        """A benchmark of a memory that does not work would be one of nothing."""
        for answer in visit.answers if isinstance(self.contender, Ours) else ():
            if answer.cached_tokens < answer.prompt_tokens - BLOCK_TOKENS:
                raise ServerFailed(
                    f"agent-memory restored {answer.cached_tokens} of {answer.prompt_tokens} "
                    f"tokens that an agent had said before a switch ({at['switch']}, to "
                    f"{at['to']})."
                )

    def _all_ask(self, server: Server, model: Model) -> Visit:
        answers, began = [], time.monotonic()
        for agent, text in self.prompts[model.name].items():
            with server.stream(agent, text, ANSWER_TOKENS, model) as answer:
                answers.append(answer.wait())
        return Visit(answers[-1].moments[0] - began, answers)

    def _note(self, name: str, at: At, unit: str, value: float, *, more: bool = False) -> None:
        self.bench.notes.add(name, at, unit, self.contender.name, value, more_is_better=more)


def _hello(server: Server, model: Model) -> Stream:
    """Until then the model is loaded, also where a server loads when it is asked."""
    with server.stream("switch-hello", "Hello!", HELLO_TOKENS, model) as answer:
        return answer.wait()


def _at(switch: str, model: Model, sizes: Sizes) -> At:
    return {"switch": switch, "to": model.name, "agents": sizes.agents, "tokens": sizes.tokens}


def _limits(bench: Bench, models: Sequence[Model], sizes: Sizes, known: Known) -> None:
    """What is left if nothing but the work is done: an agent's bytes read, one step computed."""
    for model in models:
        num_tokens = known.num_tokens[model.name]
        load_s = bench.limits.load_s(model)
        step_s = bench.limits.step_s(model, num_tokens)
        read_s = bench.limits.read_s(known.num_bytes[model.name])
        cold_ms = 1000 * bench.limits.prefill_s(model, num_tokens)
        bench.notes.limit(EACH, _at("first visit", model, sizes), cold_ms)
        for switch, agent_s in (("hot", step_s), ("restart", read_s + step_s)):
            if switch == "hot" and len(models) == 1:
                continue
            at, loaded_s = _at(switch, model, sizes), load_s if switch == "restart" else 0
            bench.notes.limit("first token", at, 1000 * agent_s)
            bench.notes.limit(EACH, at, 1000 * agent_s)
            bench.notes.limit("back at work", at, loaded_s + sizes.agents * agent_s)
            bench.notes.limit("tokens restored", at, sizes.agents * num_tokens)
        bench.notes.limit("start", _at("restart", model, sizes), load_s)


PART = Part("switch", "Model switches", measure, seconds={"quick": 45, "normal": 160, "full": 1300})
