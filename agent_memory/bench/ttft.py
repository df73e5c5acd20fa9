"""The part `ttft`: the first token of prompts that are new, the same again, or one turn longer.

Two agents for each length, `again` and `more`.  In this order, on one server after another:

    none                        the prompt is new to the server
    RAM                         asked again at once
    kill -9                     killed once it was at rest, and started
    restart                     ended with SIGTERM, and started
    disk                        other agents have pushed it out of RAM; files are in the page cache
    disk, page cache dropped    the same, and files have to come from the disk itself (Linux)

The last two are ours alone, for others keep nothing on disk.  Main thread.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from agent_memory.bench.agents import kept
from agent_memory.bench.bench import Bench, Mode, Part
from agent_memory.bench.measured import At
from agent_memory.bench.models import Model, context_tokens
from agent_memory.bench.servers import Contender, Ours, Server, in_turn
from agent_memory.bench.streams import Message, Stream, assistant, user
from agent_memory.block import BLOCK_TOKENS
from agent_memory.errors import ServerFailed, UsageError

FEW_TOKENS = 8
"""Of each answer."""
TURN_TOKENS = 60
"""Of what the user says in one more turn."""
ROOM_TOKENS = 192
"""For answers and one more turn, in the context behind the longest prompt."""
NEW_TOKENS = 64
"""Of a new prompt so many may be remembered: those of the chat template."""
LEAST_POOL_BYTES = 1 << 20
READ_SHARE = 0.5
"""Of an agent's bytes, at least, the process has read from the disk, or it was not from there."""

NONE, RAM, KILLED, RESTARTED = "none", "RAM", "kill -9", "restart"
DISK, DROPPED = "disk", "disk, page cache dropped"
COLD, IDENTICAL, MORE = "cold", "identical", "one more turn"
STATES = (RAM, KILLED, RESTARTED, DISK, DROPPED)
FIRST, PROMPT, CACHED = "first token", "prompt tokens", "tokens from memory"


@dataclass(frozen=True, slots=True)
class Sizes:
    lengths: Sequence[int]
    rounds: int


SIZES: dict[Mode, Sizes] = {
    "quick": Sizes((512, 1500), 1),
    "normal": Sizes((512, 2048, 4096), 2),
    "full": Sizes((512, 2048, 4096, 7900, 16000, 32000), 5),
}
"""Lengths that the model's context has no room for are left out."""


@dataclass(slots=True)
class Talk:
    """What one agent says: a text of about `length` tokens, and then one of `turns`, by state."""

    agent: str
    length: int
    text: str
    turns: dict[str, str]

    def said(self) -> list[Message]:
        return [user(self.text)]

    def one_more(self, state: str, answer: str) -> list[Message]:
        return [*self.said(), assistant(answer), user(self.turns[state])]


@dataclass(slots=True)
class Known:
    """What limits are made of, by length: of an agent of ours, bytes, tokens and new tokens."""

    num_bytes: dict[int, int] = field(default_factory=dict)
    num_tokens: dict[int, int] = field(default_factory=dict)


def measure(bench: Bench) -> None:
    measure_sizes(bench, SIZES[bench.mode])


def measure_sizes(bench: Bench, sizes: Sizes) -> None:
    lengths = fitting(sizes.lengths, bench.models[0])
    bench.course.steps(3 * sizes.rounds * len(bench.contenders) + 1)
    known = Known()
    for number in range(sizes.rounds):
        talks = [
            Talk(
                f"ttft-{number}-{length}-{kind}",
                length,
                bench.pages.take(length),
                {state: bench.pages.take(TURN_TOKENS) for state in STATES},
            )
            for length in lengths
            for kind in ("again", "more")
        ]
        for contender in in_turn(bench.contenders, number):
            Turn(bench, contender, talks[::2], talks[1::2], f"ttft-{number}", known).measure()
    with bench.course.step("limits"):
        _limits(bench, lengths, known)


def fitting(lengths: Sequence[int], model: Model) -> list[int]:
    """Raises UsageError."""
    context = context_tokens(model) or max(lengths) + ROOM_TOKENS
    fit = [length for length in lengths if length + ROOM_TOKENS <= context]
    if not fit:
        raise UsageError(
            f"The context of {model.name} is {context} tokens, and {lengths[0] + ROOM_TOKENS} are "
            "needed. Use another --model, or --only with other parts."
        )
    return fit


@dataclass(slots=True)
class Turn:
    """One contender's part of a round.  `state_name`: of the folder that all its servers share."""

    bench: Bench
    contender: Contender
    again: Sequence[Talk]
    more: Sequence[Talk]
    state_name: str
    known: Known
    first: dict[str, Stream] = field(default_factory=dict)
    """By agent: the answer to its new prompt."""

    @property
    def model(self) -> Model:
        return self.bench.models[0]

    def measure(self) -> None:
        step, name = self.bench.course.step, self.contender.name
        with ExitStack() as stack:
            with step(f"{name}, new and from RAM"):
                server = self._started(stack)
                self._new_and_at_once(server)
                pool_bytes = self._pool_bytes(server)
                server.kill()
            with step(f"{name}, after kill -9"):
                server = self._started(stack)
                self._come_back(server, KILLED)
                server.stop()
            with step(f"{name}, after a restart"):
                server = self._started(stack, pool_bytes)
                self._come_back(server, RESTARTED)
                if isinstance(self.contender, Ours):
                    self._from_disk(server, self.contender)

    def _started(self, stack: ExitStack, pool_bytes: int | None = None) -> Server:
        if isinstance(self.contender, Ours) and pool_bytes is not None:
            flags = "--pool-bytes", str(pool_bytes)
            server = self.contender.start([self.model], self.state_name, *flags)
        else:
            server = self.contender.start([self.model], self.state_name)
        stack.enter_context(server).ask("ttft-hello", "Hello!", self.model, FEW_TOKENS)
        return server

    def _new_and_at_once(self, server: Server) -> None:
        for talk in self.again:
            self._cold(server, talk)
            self._identical(server, talk, RAM)
        for talk in self.more:
            self._cold(server, talk)
            self._one_more_turn(server, talk, RAM)

    def _come_back(self, server: Server, state: str) -> None:
        for talk in self.again:
            self._identical(server, talk, state)
        for talk in self.more:
            self._one_more_turn(server, talk, state)

    def _from_disk(self, server: Server, ours: Ours) -> None:
        """Only as much fits the RAM of this server as the longest agent has in mind."""
        blocks = ours.state_dir(self.state_name) / "blocks"
        for state in (DISK, DROPPED) if sys.platform == "linux" else (DISK,):
            for talk, ask in (
                *((talk, self._identical) for talk in self.again),
                *((talk, self._one_more_turn) for talk in self.more),
            ):
                self._push_out(server, talk)
                if state == DROPPED:
                    drop_page_cache(blocks)
                ask(server, talk, state)

    def _push_out(self, server: Server, talk: Talk) -> None:
        """Nothing of it is left in RAM.  Raises ServerFailed."""
        longest = [other for other in (self.again[-1], self.more[-1]) if other is not talk]
        for other in [*longest, *longest]:
            if not kept(server, talk.agent).memory:
                return
            with server.stream(other.agent, other.said(), FEW_TOKENS, self.model) as answer:
                answer.wait()
        if left := kept(server, talk.agent).memory:
            raise ServerFailed(f"{left} tokens of {talk.agent} stay in RAM, whoever else asks.")

    def _pool_bytes(self, server: Server) -> int | None:
        """What the longest agent takes, less than two of them need: one pushes out the other."""
        if not isinstance(self.contender, Ours):
            return None
        for talk in self.again:
            self.known.num_bytes[talk.length] = kept(server, talk.agent).num_bytes
        return max(LEAST_POOL_BYTES, self.known.num_bytes[self.again[-1].length])

    # one answer

    def _cold(self, server: Server, talk: Talk) -> None:
        answer = self._asked(server, talk, talk.said(), NONE, COLD)
        self.first[talk.agent] = answer
        if isinstance(self.contender, Ours):
            self.known.num_tokens[talk.length] = answer.prompt_tokens
            if answer.cached_tokens > NEW_TOKENS:
                raise ServerFailed(f"{answer.cached_tokens} tokens of a new text were remembered.")

    def _identical(self, server: Server, talk: Talk, state: str) -> None:
        answer = self._asked(server, talk, talk.said(), state, IDENTICAL)
        self._check(answer, answer.prompt_tokens, state)

    def _one_more_turn(self, server: Server, talk: Talk, state: str) -> None:
        first = self.first[talk.agent]
        answer = self._asked(server, talk, talk.one_more(state, first.text), state, MORE)
        self._check(answer, first.prompt_tokens, state)

    def _asked(
        self, server: Server, talk: Talk, messages: list[Message], state: str, prompt: str
    ) -> Stream:
        before = bytes_from_disk(server.pid)
        with server.stream(talk.agent, messages, FEW_TOKENS, self.model) as answer:
            answer.wait()
        if prompt != IDENTICAL:
            server.rest()  # there is something to write
        if state == DROPPED:
            read = bytes_from_disk(server.pid) - before
            if read < READ_SHARE * self.known.num_bytes[talk.length]:
                return answer  # a file system that keeps everything in memory, such as tmpfs
        at, name, notes = _at(state, prompt, talk.length), self.contender.name, self.bench.notes
        notes.add(FIRST, at, "ms", name, 1000 * answer.first_token_s)
        notes.add(PROMPT, at, "tokens", name, answer.prompt_tokens)
        notes.add(CACHED, at, "tokens", name, answer.cached_tokens, more_is_better=True)
        return answer

    def _check(self, answer: Stream, said_before: int, state: str) -> None:
        """A benchmark of a memory that does not work would be one of nothing."""
        cached = answer.cached_tokens
        if isinstance(self.contender, Ours) and cached < said_before - BLOCK_TOKENS:
            raise ServerFailed(
                f"agent-memory had {cached} of {said_before} tokens that an agent had said before "
                f"(state: {state})."
            )


def drop_page_cache(folder: Path) -> None:
    """Of all block files: what is read next of them comes from the disk."""
    if sys.platform != "linux":
        return
    for file in folder.glob("*/*"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # only what is on the disk can leave the page cache
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def bytes_from_disk(pid: int) -> int:
    """What the process has had the disk itself read so far; 0 where the system does not tell."""
    try:
        rows = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(row.split()[1]) for row in rows if row.startswith("read_bytes:")), 0)


def _at(state: str, prompt: str, length: int) -> At:
    return {"state": state, "prompt": prompt, "tokens": length}


def _limits(bench: Bench, lengths: Sequence[int], known: Known) -> None:
    """What is left if nothing but the work is done."""
    limits, model = bench.limits, bench.models[0]
    for length in lengths:
        num_tokens, num_bytes = known.num_tokens[length], known.num_bytes[length]
        step_s = limits.step_s(model, num_tokens)
        computing_s = {
            COLD: limits.prefill_s(model, num_tokens),
            IDENTICAL: step_s,
            MORE: max(step_s, limits.prefill_s(model, TURN_TOKENS)),
        }
        reading_s = {NONE: 0.0, RAM: 0.0, DROPPED: limits.read_cold_s(num_bytes)}
        warm_s = limits.read_s(num_bytes)
        for one in bench.notes:
            if one.name == FIRST and one.at["tokens"] == length:
                read_s = reading_s.get(str(one.at["state"]), warm_s)
                if read_s is not None:
                    one.limit = 1000 * (read_s + computing_s[str(one.at["prompt"])])


PART = Part(
    "ttft", "Time to first token", measure, seconds={"quick": 25, "normal": 200, "full": 750}
)
