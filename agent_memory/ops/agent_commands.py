"""The command `agents`: what people do with an agent's memory, asked of a running server.

Knows how each answer looks.  Main thread.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from agent_memory.errors import UsageError
from agent_memory.ops.agent_client import Advance, AgentClient
from agent_memory.ops.terminal import Terminal, ago, number, size, visible

Entry = dict[str, Any]


def main(args: argparse.Namespace) -> int:
    """Raises StartError."""
    with AgentClient.named(args) as client:
        Commands(client, Terminal(as_json=args.json)).run(args)
    return 0


class Commands:
    def __init__(self, client: AgentClient, terminal: Terminal) -> None:
        self._client = client
        self._terminal = terminal

    def run(self, args: argparse.Namespace) -> None:
        commands: dict[str, Callable[[argparse.Namespace], None]] = {
            "ls": self._ls,
            "show": self._show,
            "fork": self._fork,
            "rewind": self._rewind,
            "pin": self._pin,
            "unpin": self._unpin,
            "warm": self._warm,
            "rm": self._rm,
            "export": self._export,
            "import": self._import,
        }
        commands[args.verb](args)

    def _ls(self, args: argparse.Namespace) -> None:
        agents = self._client.agents()
        if self._terminal.as_json:
            self._terminal.result(agents)
        elif agents:
            self._terminal.table(AGENT_COLUMNS, [_row(entry) for entry in agents])
        else:
            self._terminal.say("Nobody is remembered yet.")

    def _show(self, args: argparse.Namespace) -> None:
        entry = self._client.agent(args.agent, text=args.text)
        if self._terminal.as_json:
            self._terminal.result(entry)
            return
        self._terminal.table(AGENT_COLUMNS, [_row(entry)])
        for number_, head in enumerate(entry["heads"]):
            self._show_head(head, newest=number_ == 0)

    def _show_head(self, head: Entry, *, newest: bool) -> None:
        say, tiers = self._terminal.say, head["tiers"]
        name = f"head {head['id']}{' (the newest)' if newest else ''}"
        say()
        say(
            f"{name}: {number(head['tokens'])} tokens in {number(head['blocks'])} blocks, "
            f"{number(tiers['memory'])} of them in RAM, "
            f"{number(tiers['disk'])} on disk; model {head['fingerprint']}, "
            f"{ago(head['last_used'])}"
        )
        for turn in head["turns"]:
            asked, answered = turn["prompt_end"] - turn["start"], turn["end"] - turn["prompt_end"]
            say(
                f"  turn {turn['turn']}: tokens {number(turn['start'])} to {number(turn['end'])}, "
                f"{number(asked)} asked, {number(answered)} answered"
            )
            for text in (turn.get("prompt"), turn.get("answer")):
                for line in (text or "").splitlines():
                    say(f"    {visible(line)}", "dim")

    def _fork(self, args: argparse.Namespace) -> None:
        entry = self._client.verb(args.agent, "fork", name=args.name, head=args.head)
        self._done(entry, f"'{args.name}' has {number(entry['tokens'])} tokens in mind.")

    def _rewind(self, args: argparse.Namespace) -> None:
        entry = self._client.verb(
            args.agent, "rewind", tokens=args.tokens, turn=args.turn, head=args.head
        )
        self._done(entry, f"'{args.agent}' has {number(entry['tokens'])} tokens in mind.")

    def _pin(self, args: argparse.Namespace) -> None:
        entry = self._client.verb(args.agent, "pin")
        self._done(entry, f"'{args.agent}' is pinned: evicted last, and never by age.")

    def _unpin(self, args: argparse.Namespace) -> None:
        self._done(self._client.verb(args.agent, "unpin"), f"'{args.agent}' is not pinned.")

    def _warm(self, args: argparse.Namespace) -> None:
        entry = self._client.verb(args.agent, "warm")
        in_ram = number(entry["tiers"]["memory"])
        self._done(entry, f"{in_ram} of {number(entry['tokens'])} tokens are in RAM.")

    def _rm(self, args: argparse.Namespace) -> None:
        self._client.remove(args.agent)
        done = {"id": args.agent, "removed": True}
        self._done(done, f"Nothing is left that was '{args.agent}' alone.")

    def _export(self, args: argparse.Namespace) -> None:
        name = f"{args.agent.replace(':', '_')}.agent-memory.tar"
        target: Path = args.output or Path(name)
        try:
            is_there, is_folder = target.exists(), target.is_dir()
        except OSError as error:
            raise UsageError(f"{target} cannot be written: {error.strerror}.") from error
        if is_folder:
            raise UsageError(f"{target} is a folder. Name a file with -o.")
        if is_there and not args.force:
            raise UsageError(f"{target} is there already. Name another with -o, or add --force.")
        num_bytes = self._moving(
            "export", lambda advance: self._client.export(args.agent, target, advance)
        )
        done = {"id": args.agent, "file": str(target), "bytes": num_bytes}
        self._done(done, f"{target}: {size(num_bytes)}. It holds what was said: keep it private.")

    def _import(self, args: argparse.Namespace) -> None:
        entry = self._moving(
            "import", lambda advance: self._client.import_file(args.file, args.name, advance)
        )
        self._done(entry, f"'{entry['id']}' has {number(entry['tokens'])} tokens in mind.")

    def _moving(self, what: str, move: Callable[[Advance], Any]) -> Any:
        with self._terminal.transferring() as progress:
            task = progress.add_task(what, total=None)
            return move(lambda done, of: progress.update(task, completed=done, total=of))

    def _done(self, entry: Entry, text: str) -> None:
        if self._terminal.as_json:
            self._terminal.result(entry)
        else:
            self._terminal.say(text)


AGENT_COLUMNS = (
    "agent",
    ">tokens",
    ">in RAM",
    ">on disk",
    ">heads",
    ">own",
    ">shared",
    ">size",
    ">written",
    "last used",
    "",
)


def _row(entry: Entry) -> Sequence[str]:
    return (
        entry["id"],
        number(entry["tokens"]),
        number(entry["tiers"]["memory"]),
        number(entry["tiers"]["disk"]),
        number(len(entry["heads"])),
        number(entry["blocks"]["own"]),
        number(entry["blocks"]["shared"]),
        size(entry["bytes"]),
        size(entry["bytes_written"]),
        ago(entry["last_used"]),
        "pinned" if entry["pinned"] else "",
    )
