"""How the demo looks while it runs and when it is done: for people, or as one JSON object.

People read standard output.  With --json that is the object's alone, and progress goes to standard
error.  Main thread.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from agent_memory.ops.demo_agents import Agent
from agent_memory.ops.demo_outcome import Outcome, Phase, Turn
from agent_memory.ops.process import Line, ServerProcess, Stopped

_NOT_SHOWN = {"event", "level", "timestamp", "stage", "ok", "ms", "budget_ms"}


class Report:
    """`steps`: how many things will be done in all, for the progress bar."""

    def __init__(self, *, as_json: bool, steps: int) -> None:
        self._as_json = as_json
        self._console = Console(stderr=as_json, highlight=False)
        columns = (
            SpinnerColumn(),
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
        )
        self._progress = Progress(
            *columns,
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=steps)

    @contextmanager
    def running(self) -> Iterator[None]:
        with self._progress:
            yield

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        self._progress.update(self._task, description=what)
        yield
        self._progress.advance(self._task)

    def say(self, text: str = "", style: str = "") -> None:
        self._console.print(text, style=style, markup=False, soft_wrap=True)

    def introduced(self, agents: Sequence[Agent]) -> None:
        self.say("Two agents, each told its own facts and then given some pages to read:")
        for agent in agents:
            self.say(f"  {agent.name}: {'; '.join(agent.facts)}")

    def started(self, server: ServerProcess) -> None:
        for text in server.early:
            self.say(text, "dim")
        model, bits = server.loaded["model"], server.loaded["bits"]
        kept = f"memory in {bits} bits" if bits else "memory unquantized"
        self.say(f"server {server.pid}: port {server.port}, {model} model, {kept}")

    def asked(self, turn: Turn) -> None:
        self.say(f"  {turn.agent}, {turn.phase}: {turn.question} {turn.answer}", "dim")

    def stopped(self, pid: int, stopped: Stopped) -> None:
        self.say(f"kill -TERM {pid}")
        for number, line in enumerate(stopped.stages, 1):
            ok = "" if line["ok"] else "FAILED "
            name = line["stage"].replace("_", " ")
            self.say(f"  {number} {name:<15}{line['ms']:>6} ms  {ok}{_figures(line)}".rstrip())
        self.say(f"  exit status {stopped.exit_code}")

    def finished(self, outcome: Outcome, state_dir: Path, *, kept: bool, command: str) -> None:
        if self._as_json:
            shown = _json(outcome, state_dir, kept=kept)
            sys.stdout.write(json.dumps(shown, indent=2, ensure_ascii=False) + "\n")
            return
        self.say()
        self._console.print(_table(outcome))
        self.say(
            "RAM of a cold prompt: the first few tokens, which all conversations share.", "dim"
        )
        self.say()
        problems = outcome.problems()
        for problem in problems:
            self.say(f"FAILED  {problem}", "red")
        if not problems:
            self.say(_conclusion(outcome), "bold green")
        self._say_what_next(state_dir, kept=kept, command=command)

    def _say_what_next(self, state_dir: Path, *, kept: bool, command: str) -> None:
        where = f"is in {state_dir}" if kept else "was deleted; --keep keeps it"
        self.say(f"What the agents had in mind {where}.")
        self.say("Next:")
        if kept:
            self.say(f"  {command} serve --state-dir {state_dir}")
        self.say(f"  {command} serve")
        self.say(f"  {command} serve --model mlx-community/Llama-3.2-3B-Instruct-4bit")


def _figures(line: Line) -> str:
    """What a stage counted, but for zeros."""
    figures = {name: value for name, value in line.items() if name not in _NOT_SHOWN and value}
    return ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in figures.items())


def _table(outcome: Outcome) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("agent", "phase"):
        table.add_column(name, no_wrap=True)
    for name in ("prompt\ntokens", "from\nmemory", "first\ntoken"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("answer", ""):
        table.add_column(name)
    for turn in sorted(outcome.turns, key=lambda turn: turn.agent):  # stable: phases in order
        table.add_row(*_row(turn), style="" if turn.right else "red")
        if turn.phase is Phase.GONE_ON:
            table.add_section()
    return table


def _row(turn: Turn) -> tuple[str, ...]:
    return (
        turn.agent,
        str(turn.phase),
        f"{turn.prompt_tokens:,}",
        _tiers(turn),
        f"{turn.first_token_ms:,.0f} ms",
        turn.answer,
        "right" if turn.right else "wrong",
    )


def _tiers(turn: Turn) -> str:
    tiers = (turn.from_ram, "RAM"), (turn.from_disk, "disk")
    return ", ".join(f"{count:,} {tier}" for count, tier in tiers if count) or "0"


def _conclusion(outcome: Outcome) -> str:
    cold, restarted = map(outcome.first_token_ms, (Phase.COLD, Phase.RESTARTED))
    return (
        f"The same answers, restored {outcome.ratio:.0f}× faster than computed: "
        f"{restarted:.0f} ms against {cold:.0f} ms."
    )


def _json(outcome: Outcome, state_dir: Path, *, kept: bool) -> Mapping[str, Any]:
    turns = [asdict(turn) | {"same_as_cold": outcome.same_as_cold(turn)} for turn in outcome.turns]
    stages = [
        {name: value for name, value in line.items() if name not in ("event", "level", "timestamp")}
        for line in outcome.stops[0].stages
    ]
    return {
        "ok": not outcome.problems(),
        "problems": outcome.problems(),
        "model": outcome.model,
        "kv_bits": outcome.kv_bits,
        "first_token_ms": {str(phase): round(outcome.first_token_ms(phase), 1) for phase in Phase},
        "ratio": round(outcome.ratio, 1),
        "turns": turns,
        "shutdown": {"exit_code": outcome.stops[0].exit_code, "stages": stages},
        "state_dir": str(state_dir) if kept else None,
    }
