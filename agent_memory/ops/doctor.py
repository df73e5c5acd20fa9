"""The command `doctor`: what is wrong here, and what to do about it.

Main thread.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from agent_memory import config
from agent_memory.config import Config
from agent_memory.errors import StateDirError
from agent_memory.ops.checks import CHECKS, Case, Finding, Level, fail
from agent_memory.ops.machine import Machine
from agent_memory.ops.terminal import Terminal
from agent_memory.store import starts
from agent_memory.store.state_dir import private_folder

EXIT_FOUND_BAD = 1
STYLES = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "red"}


def main(args: argparse.Namespace) -> int:
    """0 unless something fails.  Raises StartError."""
    settings = config.load(vars(args), os.environ, args.config)
    terminal = Terminal(as_json=args.json)
    if args.reset:
        reset(settings.state_dir)
    findings = examine(Case(settings, Machine(), Path.home()))
    if terminal.as_json:
        terminal.result([{"check": name, **_fields(found)} for name, found in findings.items()])
    else:
        show(terminal, findings)
    bad = any(found.level is Level.FAIL for found in findings.values())
    return EXIT_FOUND_BAD if bad else 0


def examine(case: Case) -> dict[str, Finding]:
    return {name: _looked(check, case) for name, check in CHECKS.items()}


def _looked(check: Callable[[Case], Finding], case: Case) -> Finding:
    try:
        return check(case)
    except OSError as error:  # somebody else's folder, a host that has no address
        where = f"{error.filename}: " if error.filename else ""
        return fail(f"this cannot be looked at ({where}{error.strerror})", "mend that first")


def tell_wired(case: Case) -> None:
    """Before a start, where memory may be held by a server that was killed."""
    found = CHECKS["wired"](case)
    if found.then:
        sys.stderr.write(f"agent-memory: {found.found}; {found.then}\n")


def at_start(settings: Config) -> None:
    tell_wired(Case(settings, Machine(), Path.home()))


def reset(state_dir: Path) -> None:
    """Servers that ended badly before now do not count any more.  Raises StateDirError."""
    run = state_dir / "run"
    try:
        private_folder(run)
        starts.forgive(run)
    except OSError as error:
        raise StateDirError(
            f"{run} cannot be written: {error.strerror}. Mend that first."
        ) from error
    sys.stderr.write("agent-memory: what ended badly is forgiven; a server there loads its model\n")


def show(terminal: Terminal, findings: dict[str, Finding]) -> None:
    for name, found in findings.items():
        terminal.say(f"{found.level:4}  {name:16} {found.found}", STYLES[found.level])
        if found.then:
            terminal.say(f"      {'':16} → {found.then}")


def _fields(found: Finding) -> dict[str, str]:
    return {"level": str(found.level), "found": found.found, "next": found.then}
