"""The command `demo`: a newcomer's first look at what is remembered.

    start ─► each agent asks, cold ─► each asks again ─► SIGTERM ─► start ─► each asks again,
                                                                             and goes on

Knows the story.  The server is a real one in a process of its own, everything is asked over HTTP,
and the tier that tokens came from is read in the server's log.  Main thread.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from agent_memory.errors import ServerFailed
from agent_memory.ops.client import Client, Message
from agent_memory.ops.demo_agents import AGENTS, Agent, Question, user
from agent_memory.ops.demo_outcome import Outcome, Phase, Turn
from agent_memory.ops.demo_report import Report
from agent_memory.ops.process import ServerProcess

MAX_TOKENS = 40
LOG_S = 10.0
NUM_STEPS = 2 * 2 + 4 * len(AGENTS)  # two starts and stops, and every turn
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


def main(args: argparse.Namespace) -> int:
    """Raises StartError if the server fails."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the server too
    home = Path(tempfile.mkdtemp(prefix="agent-memory-demo-")).resolve()
    try:
        return Demo(args, home).run()
    except ServerFailed as error:
        hint = f"Its logs are in {home}." if args.keep else "With --keep its log stays."
        raise ServerFailed(f"{error}\n{hint}") from error
    except KeyboardInterrupt:
        sys.stderr.write("agent-memory: the demo was interrupted; its server is stopped\n")
        return EXIT_INTERRUPTED
    finally:
        if not args.keep:
            shutil.rmtree(home)


class Demo:
    def __init__(self, args: argparse.Namespace, home: Path) -> None:
        self._home = home
        self._keep: bool = args.keep
        self._report = Report(as_json=args.json, steps=NUM_STEPS)
        self._flags = _serve_flags(args, home)
        self._num_servers = 0
        self._outcome = Outcome()

    def run(self) -> int:
        with self._report.running():
            self._report.introduced(AGENTS)
            self._first_server()
            self._second_server()
        state_dir = self._home / "state"
        self._report.finished(self._outcome, state_dir, kept=self._keep, command=_command())
        return EXIT_FAILED if self._outcome.problems() else 0

    def _first_server(self) -> None:
        with self._served() as (server, client):
            for phase in (Phase.COLD, Phase.AGAIN):
                for agent in AGENTS:
                    self._ask(server, client, agent, phase)

    def _second_server(self) -> None:
        with self._served() as (server, client):
            for agent in AGENTS:
                turn = self._ask(server, client, agent, Phase.RESTARTED)
                self._go_on(server, client, agent, turn)

    @contextmanager
    def _served(self) -> Iterator[tuple[ServerProcess, Client]]:
        """A server and a client of it; at the end it is stopped and what it said is kept."""
        self._num_servers += 1
        log_file = self._home / f"server-{self._num_servers}.log"
        with self._report.step("starting the server"):
            server = ServerProcess(self._flags, log_file)
        with server:
            self._report.started(server)
            self._outcome.model = server.loaded["model"]
            self._outcome.kv_bits = server.loaded["bits"]
            with Client(server.port) as client:
                client.chat("warm-up", [user("Hello!")], MAX_TOKENS)
                yield server, client
            with self._report.step("stopping the server"):
                stopped = server.stop()
            self._outcome.stops.append(stopped)
            self._report.stopped(server.pid, stopped)

    def _ask(self, server: ServerProcess, client: Client, agent: Agent, phase: Phase) -> Turn:
        """The first question, on top of the introduction."""
        return self._turn(server, client, agent, phase, agent.first, agent.introduction())

    def _go_on(self, server: ServerProcess, client: Client, agent: Agent, turn: Turn) -> None:
        """The second question, on top of the first and its answer."""
        so_far = [
            *agent.introduction(),
            user(turn.question),
            {"role": "assistant", "content": turn.answer},
        ]
        self._turn(server, client, agent, Phase.GONE_ON, agent.second, so_far)

    def _turn(
        self,
        server: ServerProcess,
        client: Client,
        agent: Agent,
        phase: Phase,
        question: Question,
        so_far: Sequence[Message],
    ) -> Turn:
        with self._report.step(f"{agent.name}, {phase}"):
            answer = client.chat(agent.name, [*so_far, user(question.text)], MAX_TOKENS)
            done = server.wait_for("request_done", LOG_S, request_id=answer.request_id)
        turn = Turn(
            agent=agent.name,
            phase=phase,
            question=question.text,
            answer=answer.text,
            right=question.fact in answer.text,
            prompt_tokens=answer.prompt_tokens,
            from_ram=done["cached_memory"],
            from_disk=done["cached_disk"],
            first_token_ms=round(1000 * answer.first_token_s, 1),
        )
        self._outcome.turns.append(turn)
        self._report.asked(turn)
        return turn


def _serve_flags(args: argparse.Namespace, home: Path) -> list[str]:
    """The built-in model, a state directory of its own and no settings file of the user's."""
    config = home / "config.toml"
    config.touch()
    flags = ["--config", str(config), "--model", "builtin", "--state-dir", str(home / "state")]
    if args.kv_bits is not None:
        flags += ["--kv-bits", args.kv_bits]
    return [*flags, "--no-preload"] if args.no_preload else flags


def _command() -> str:
    """What to type for this very installation."""
    if shutil.which("agent-memory"):
        return "agent-memory"
    script = Path(sys.executable).with_name("agent-memory")
    return os.path.relpath(script) if script.exists() else "python -m agent_memory"
