"""The command `store`: a state directory looked at, and put in order, without a server.

`ls` and `verify` work beside a running server.  The others take its lock; whoever holds it already
is named.  Main thread.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog

from agent_memory import config
from agent_memory.errors import NotFound, RequestRefused, StateDirError, UsageError
from agent_memory.ops.terminal import Terminal, ago, number, size
from agent_memory.store import look, upkeep
from agent_memory.store.look import AgentSeen, Amount, Seen, Verified
from agent_memory.store.state_dir import StateDir

EXIT_FOUND_BAD = 1


def main(args: argparse.Namespace) -> int:
    """Raises StartError."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    path = config.load(vars(args), os.environ, args.config).state_dir
    if not path.is_dir():
        raise StateDirError(f"There is no store in {path}. Name the right one with --state-dir.")
    return Commands(path, Terminal(as_json=args.json)).run(args)


class Commands:
    def __init__(self, path: Path, terminal: Terminal) -> None:
        self._path = path
        self._terminal = terminal

    def run(self, args: argparse.Namespace) -> int:
        commands: dict[str, Callable[[argparse.Namespace], int]] = {
            "ls": self._ls,
            "verify": self._verify,
            "gc": self._gc,
            "rebuild": self._rebuild,
            "wipe": self._wipe,
        }
        return commands[args.verb](args)

    def _ls(self, args: argparse.Namespace) -> int:
        seen = look.look(StateDir.unlocked(self._path))
        if self._terminal.as_json:
            self._terminal.result({"state_dir": str(self._path), **_json(seen)})
            return 0
        say = self._terminal.say
        if seen.agents:
            self._terminal.table(AGENT_COLUMNS, [_row(agent) for agent in seen.agents])
        else:
            say("No agent is remembered.")
        say()
        say(f"{self._path}: {_words(seen.blocks, 'blocks')}, {_words(seen.unowned, 'of no agent')}")
        for fingerprint, amount in seen.models.items():
            say(f"  model {fingerprint.hex()[:16]}: {_words(amount, 'blocks')}")
        if seen.quarantine.count:
            say(f"  quarantine: {_words(seen.quarantine, 'files')}")
        for name, amount in seen.set_aside.items():
            say(f"  {name}: {_words(amount, 'files')} of another version")
        return 0

    def _verify(self, args: argparse.Namespace) -> int:
        if args.fix:
            with self._locked() as state:
                verified = self._read_all(state)
                upkeep.quarantine(state, [path for path, _ in verified.bad])
        else:
            verified = self._read_all(StateDir.unlocked(self._path))
        bad = [{"file": str(path), "reason": reason} for path, reason in verified.bad]
        self._done(
            {
                "good": _amount(verified.good),
                "not_indexed": verified.new,
                "bad": bad,
                "fixed": bool(args.fix),
            },
            f"{_words(verified.good, 'good files')}, {number(len(bad))} bad",
        )
        if not self._terminal.as_json:
            for path, reason in verified.bad:
                self._terminal.say(f"  {path}: {reason}", "red")
            if bad and args.fix:
                self._terminal.say("They are in quarantine; what they held is computed again.")
            elif bad:
                self._terminal.say("--fix takes them out of use, with the server stopped.")
        return EXIT_FOUND_BAD if bad and not args.fix else 0

    def _read_all(self, state: StateDir) -> Verified:
        with self._terminal.counting() as progress:
            task = progress.add_task("verify", total=None)
            return look.verify(
                state, lambda done, of: progress.update(task, completed=done, total=of)
            )

    def _gc(self, args: argparse.Namespace) -> int:
        with self._locked() as state:
            found = upkeep.collect(state, dry_run=args.dry_run)
        self._done(
            {
                "blocks": _amount(found.blocks),
                "quarantine": _amount(found.quarantine),
                "set_aside": _amount(found.set_aside),
                "dry_run": args.dry_run,
            },
            f"{'Would delete' if args.dry_run else 'Deleted'} "
            f"{_words(found.blocks, 'blocks of no agent')}, "
            f"{_words(found.quarantine, 'quarantined files')}, "
            f"{_words(found.set_aside, 'stores of other versions')}.",
        )
        return 0

    def _rebuild(self, args: argparse.Namespace) -> int:
        with self._locked() as state:
            blocks = upkeep.rebuild(state)
        self._done(_amount(blocks), f"The index is made anew: {_words(blocks, 'blocks')}.")
        return 0

    def _wipe(self, args: argparse.Namespace) -> int:
        what = f"what only '{args.agent}' has in mind" if args.agent else "everything"
        if not args.yes:
            raise UsageError(
                f"This would delete {what} in {self._path}, for good. Add --yes if you mean it."
            )
        with self._locked() as state:
            amount = self._wipe_in(state, args.agent)
        self._done(_amount(amount), f"Deleted {what}: {_words(amount, 'files')}.")
        return 0

    def _wipe_in(self, state: StateDir, agent_id: str | None) -> Amount:
        if agent_id is None:
            return upkeep.wipe(state)
        try:
            return upkeep.wipe_agent(state, agent_id)
        except NotFound as error:
            raise RequestRefused(f"Nothing is remembered of an agent '{agent_id}'.") from error

    @contextmanager
    def _locked(self) -> Iterator[StateDir]:
        state = StateDir.open(self._path)
        try:
            yield state
        finally:
            state.close()

    def _done(self, value: dict[str, Any], text: str) -> None:
        if self._terminal.as_json:
            self._terminal.result(value)
        else:
            self._terminal.say(text)


AGENT_COLUMNS = (
    "agent",
    ">tokens",
    ">heads",
    ">own blocks",
    ">size",
    ">shared",
    ">size",
    ">written",
    "last used",
    "",
)


def _row(seen: AgentSeen) -> tuple[str, ...]:
    agent = seen.agent
    return (
        agent.id,
        number(agent.heads[0].num_tokens),
        number(len(agent.heads)),
        number(seen.own.count),
        size(seen.own.nbytes),
        number(seen.shared.count),
        size(seen.shared.nbytes),
        size(agent.bytes_written),
        ago(agent.last_used),
        "pinned" if agent.pinned else "",
    )


def _json(seen: Seen) -> dict[str, Any]:
    return {
        "agents": [
            {
                "id": one.agent.id,
                "tokens": one.agent.heads[0].num_tokens,
                "heads": len(one.agent.heads),
                "own": _amount(one.own),
                "shared": _amount(one.shared),
                "bytes_written": one.agent.bytes_written,
                "pinned": one.agent.pinned,
                "last_used": round(one.agent.last_used, 3),
            }
            for one in seen.agents
        ],
        "blocks": _amount(seen.blocks),
        "unowned": _amount(seen.unowned),
        "models": {name.hex()[:16]: _amount(amount) for name, amount in seen.models.items()},
        "quarantine": _amount(seen.quarantine),
        "set_aside": {name: _amount(amount) for name, amount in seen.set_aside.items()},
    }


def _amount(amount: Amount) -> dict[str, int]:
    return {"count": amount.count, "bytes": amount.nbytes}


def _words(amount: Amount, what: str) -> str:
    return f"{number(amount.count)} {what} ({size(amount.nbytes)})"
