"""Half an hour of a server's life: 20 agents, two models, clients that leave, `kill -9`.

Every answer is computed again by mlx-lm alone.  In the second half nobody kills the server, and
what it holds must not grow once its pool and its explanations are full.
"""

import os
import queue
import random
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from agent_memory.model import loader
from agent_memory.model.loader import LoadedModel
from agent_memory.processes import output
from agent_memory.store import starts
from tests.cold import asked
from tests.conftest import builtin_model
from tests.e2e.conversations import Messages, conversations, judge, plain_answer
from tests.model import tiny
from tests.process import CHAT, Server
from tests.suites import NewSuite

NUM_AGENTS = 20
SLICE_S = 10.0
SLICES = 180
KILLED_IN = 0.1
"""Of the slices of the first half."""
UNLOADED_IN = 0.5
LEFT_EARLY = 0.15
TRIES_S = 120.0
SETTINGS = ("--kv-bits", "none", "--pool-bytes", "32M", "--disk-bytes", "1G")
GROWTH = 1.05
"""Of what is resident, from the third quarter of that half to the last."""
MORE_DESCRIPTORS = NUM_AGENTS // 2
"""Some agents are connected at one time, others at another."""


@dataclass(frozen=True)
class Turn:
    model: str
    messages: Messages
    text: str
    prompt: int
    cached: int
    """As the server told; `known` is what it had told of this conversation before."""
    known: int


@dataclass
class Life:
    """Where the server is now, and what became of the questions."""

    url: str
    turns: "queue.Queue[Turn]" = field(default_factory=lambda: queue.Queue(NUM_AGENTS))
    """Not to be checked too late: who finds no room waits with the next question."""
    problems: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)


class Agent(threading.Thread):
    """Holds one conversation after the other, and asks again until it is answered."""

    def __init__(self, life: Life, number: int) -> None:
        super().__init__(daemon=True)
        self._life = life
        self._number = number
        self._rng = random.Random(number)
        self._http = httpx.Client(timeout=TRIES_S, trust_env=False)

    def run(self) -> None:
        with self._http:
            self._talk()

    def _talk(self) -> None:
        for talk in conversations(10_000, self._number):
            model = "builtin" if self._rng.random() < 0.7 else "other"
            known = 0
            for text in talk.turns:
                if self._life.over.wait(self._rng.random()):
                    return
                turn = self._answered(model, talk.said(text), known)
                if turn is None:
                    return
                if not self._told(turn):
                    return
                talk.heard(text, turn.text)
                known = turn.prompt

    def _told(self, turn: Turn) -> bool:
        while not self._life.over.is_set():
            with suppress(queue.Full):
                self._life.turns.put(turn, timeout=0.5)
                return True
        return False

    def _answered(self, model: str, messages: Messages, known: int) -> Turn | None:
        deadline = time.monotonic() + TRIES_S
        while not self._life.over.is_set():
            if time.monotonic() > deadline:
                self._life.problems.append(f"agent {self._number}: no answer for {TRIES_S:.0f} s")
                return None
            try:
                if self._rng.random() < LEFT_EARLY:
                    self._leave(model, messages)
                return self._whole(model, messages, known)
            except httpx.TransportError:
                time.sleep(0.2)  # killed: another comes
            except httpx.HTTPStatusError as error:
                if error.response.status_code != 503:
                    self._life.problems.append(f"{error}: {error.response.text}")
                    return None
                time.sleep(float(error.response.headers["Retry-After"]) / 4)
        return None

    def _leave(self, model: str, messages: Messages) -> None:
        """In the middle of an answer, or before its first word."""
        body = {**asked(messages), "model": model, "stream": True}
        with self._http.stream(
            "POST", self._life.url + CHAT, json=body, headers=self._headers
        ) as answer:
            for _ in zip(range(self._rng.randrange(8)), answer.iter_lines(), strict=False):
                pass

    def _whole(self, model: str, messages: Messages, known: int) -> Turn:
        body = {**asked(messages), "model": model}
        answer = self._http.post(self._life.url + CHAT, json=body, headers=self._headers)
        told = answer.raise_for_status().json()
        usage = told["usage"]
        text = told["choices"][0]["message"]["content"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return Turn(model, messages, text, usage["prompt_tokens"], cached, known)

    @property
    def _headers(self) -> dict[str, str]:
        return {"X-Agent-ID": f"agent-{self._number}"}


@dataclass(frozen=True)
class Held:
    resident_kb: int
    descriptors: int

    @classmethod
    def by(cls, pid: int) -> "Held":
        resident = int(output("ps", "-o", "rss=", "-p", str(pid)))
        files = Path(f"/proc/{pid}/fd")
        return cls(resident, len(os.listdir(files)) if files.exists() else 0)


class Soak:
    def __init__(self, folder: Path, num_slices: int) -> None:
        self._folder = folder
        self._rng = random.Random(0)
        self._flags = [*SETTINGS, "--model", "builtin"]
        self._flags += ["--model", f"other={tiny.save('qwen3', folder / 'other')}"]
        self._other = loader.load_whole(str(folder / "other"), None, 64)
        self._no_kills_from = num_slices // 2
        self.server = self._start(0)
        self.life = Life(self.server.url)
        self.held: list[Held] = []
        self.kills = self.answers = self.gone_on = self.from_memory = 0

    def _start(self, port: int) -> Server:
        return Server(self._folder, *self._flags, port=port).wait_ready()

    def slice(self, number: int) -> None:
        """Some seconds of it, in which answers are checked as they come."""
        until = time.monotonic() + SLICE_S
        if number < self._no_kills_from and self._rng.random() < KILLED_IN:
            self._kill()
        if self._rng.random() < UNLOADED_IN:
            model = self._rng.choice(("builtin", "other"))
            assert self.server.post({}, f"/v1/models/{model}/unload").status_code in (200, 409)
        self._check(until)
        if number >= self._no_kills_from:
            self.held.append(Held.by(self.server.pid))
        assert not self.life.problems, self.life.problems

    def _kill(self) -> None:
        time.sleep(self._rng.random())
        self.server.signal(signal.SIGKILL)
        assert self.server.wait(10) == -signal.SIGKILL
        self.kills += 1
        starts.forgive(self._folder / "state" / "run")  # else it loads nothing after three
        self.server = self._start(self.server.port)

    def _check(self, until: float) -> None:
        while (left := until - time.monotonic()) > 0:
            with suppress(queue.Empty):
                self._check_one(self.life.turns.get(timeout=left))

    def _check_one(self, turn: Turn) -> None:
        loaded: LoadedModel = builtin_model(None) if turn.model == "builtin" else self._other
        plain = plain_answer(loaded, turn.messages, 24)
        if plain != turn.text:
            parting = judge(loaded, turn.messages, turn.text, plain)
            assert parting.is_tie, (turn, plain, parting)
        self.answers += 1
        if turn.known:
            self.gone_on += 1
            self.from_memory += turn.cached >= turn.known

    def report(self) -> str:
        return (
            f"{self.answers} answers checked, {self.kills} kills; {self.from_memory} of "
            f"{self.gone_on} went on from memory; resident kB and descriptors: {self.grown()}"
        )

    def grown(self) -> list[tuple[float, float]]:
        """In the time without kills: medians of its third quarter and of its last one."""
        part = max(1, len(self.held) // 4)
        return [
            (statistics.median(values[-2 * part : -part]), statistics.median(values[-part:]))
            for values in (
                [held.resident_kb for held in self.held],
                [held.descriptors for held in self.held],
            )
        ]

    def end(self) -> None:
        """Also checks what has not been."""
        self.life.over.set()
        while not self.life.turns.empty():
            self._check_one(self.life.turns.get())
        self.server.signal(signal.SIGTERM)
        assert self.server.wait(60) == 0


@pytest.fixture
def soak(tmp_path: Path) -> Iterator[Soak]:
    soak = Soak(tmp_path, SLICES)
    agents = [Agent(soak.life, number) for number in range(NUM_AGENTS)]
    for agent in agents:
        agent.start()
    yield soak
    soak.life.over.set()
    soak.server.end()
    for agent in agents:
        agent.join(TRIES_S)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_half_an_hour(soak: Soak, suite: NewSuite, capsys: pytest.CaptureFixture[str]) -> None:
    with suite("soak, slices of 10 s", SLICES, 0) as cases:
        for number in range(SLICES):
            with cases.case(number):
                soak.slice(number)
    soak.end()
    with capsys.disabled():
        sys.stdout.write(f"\n{soak.report()}\n")
    assert soak.kills > 0 and soak.from_memory >= 0.95 * soak.gone_on > 0
    resident, descriptors = soak.grown()
    assert resident[1] <= GROWTH * resident[0]
    assert descriptors[1] <= descriptors[0] + MORE_DESCRIPTORS
