"""The command `service`: a server that the system starts at login and again when it fails.

Main thread.
"""

import argparse
import os
import subprocess
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from agent_memory import config
from agent_memory.config import Config
from agent_memory.errors import RequestRefused, UsageError
from agent_memory.ops.running import Running
from agent_memory.ops.service import KINDS, START_S, Launchd, Step, Systemd

SPARE_S = 30.0
VARIABLES = [setting.variable for setting in config.SETTINGS]


def main(args: argparse.Namespace) -> int:
    """Raises StartError."""
    kind = args.kind or ("launchd" if sys.platform == "darwin" else "systemd")
    return Commands(KINDS[kind](Path.home()), args).run()


class Commands:
    """Which server is meant the installed file says, whatever the settings are by now.

    It also says how long its supervisor waits; what the supervisor is told may take longer.
    """

    def __init__(self, kind: Launchd | Systemd, args: argparse.Namespace) -> None:
        self._kind = kind
        self._args = args
        there = kind.path.exists()
        self._installed = kind.path.read_text("utf-8", "replace") if there else ""
        self._step_s = max(START_S, kind.stop_s(self._installed) or 0.0) + SPARE_S

    def run(self) -> int:
        commands = {
            "install": self._install,
            "uninstall": self._uninstall,
            "start": self._start,
            "stop": self._stop,
            "status": self._status,
        }
        return commands[self._args.verb]()

    def _install(self) -> int:
        kind, settings = self._kind, config.load(vars(self._args), {}, self._args.config)
        text = kind.text(self._command(settings), settings.drain_timeout)  # as the service sees it
        if here := sorted(set(VARIABLES) & os.environ.keys()):
            sys.stderr.write(
                f"agent-memory: a service does not see {', '.join(here)}: settings of its own go "
                f"into {self._args.config or config.CONFIG_FILE}\n"
            )
        if self._args.print:
            sys.stdout.write(text)
            return 0
        if kind.path.exists() and not self._args.force:
            raise UsageError(
                f"{kind.path} is there already. Look at what would be written with --print, and "
                "replace it with --force."
            )
        if kind.path.exists():
            self._end()
        for folder in {kind.path.parent, *({kind.log.parent} if isinstance(kind, Launchd) else ())}:
            folder.mkdir(parents=True, exist_ok=True)
        kind.path.write_text(text, "utf-8")
        try:
            self._run(kind.install())
        except RequestRefused:
            self._undo()
            raise
        _say(f"{kind.path} is written; the server runs and starts again at every login.")
        return 0

    def _undo(self) -> None:
        """A file that the supervisor does not take is not left behind."""
        with suppress(RequestRefused):
            self._run(self._kind.uninstall())
        self._kind.path.unlink()
        with suppress(RequestRefused):
            self._run(self._kind.removed())

    def _uninstall(self) -> int:
        self._known()
        self._end()
        self._kind.path.unlink()
        self._run(self._kind.removed())
        _say(f"{self._kind.path} is gone. What is remembered is still there.")
        return 0

    def _start(self) -> int:
        self._known()
        self._run(self._kind.start())
        _say("Started. 'agent-memory status' says how far it is.")
        return 0

    def _stop(self) -> int:
        self._known()
        self._let_it_end()
        self._run(self._kind.stop())
        _say("Stopped. It starts again at the next login, or with 'agent-memory service start'.")
        return 0

    def _status(self) -> int:
        """What the supervisor says, and its exit status."""
        self._known()
        done = self._done(self._kind.status())
        sys.stdout.write(done.stdout)
        sys.stderr.write(done.stderr)
        return done.returncode

    def _end(self) -> None:
        self._let_it_end()
        self._run(self._kind.uninstall())

    def _let_it_end(self) -> None:
        """launchd has been seen to kill seconds after it asked to end: it is asked when nothing
        runs any more.  systemd waits as it is told."""
        if isinstance(self._kind, Launchd):
            running = Running.find(self._state_dir())
            if running is not None and running.holder.url:
                running.stop(None, lambda stage: None)

    def _state_dir(self) -> Path:
        """Of the server that is installed."""
        named = dict(pairwise(self._kind.command(self._installed)))
        if "--state-dir" in named:
            return Path(named["--state-dir"])
        file = named.get("--config")
        return config.load({}, {}, Path(file) if file else None).state_dir

    def _command(self, settings: Config) -> list[str]:
        """Settings are read from their file at each start; only what was named here is fixed."""
        command = [sys.executable, "-m", "agent_memory", "serve", "--log-format", "json"]
        if self._args.config is not None:
            command += ["--config", str(self._args.config.expanduser().absolute())]
        if "state_dir" in vars(self._args):
            command += ["--state-dir", str(settings.state_dir)]
        return command

    def _known(self) -> None:
        if not self._kind.path.exists():
            raise UsageError(
                f"There is no {self._kind.path}. 'agent-memory service install' writes it."
            )

    def _run(self, steps: list[Step]) -> None:
        for step in steps:
            done = self._done(step)
            if done.returncode and step.must:
                said = (done.stderr or done.stdout).strip() or "no reason"
                raise RequestRefused(
                    f"'{' '.join(step.command)}' failed with {done.returncode}: {said}"
                )

    def _done(self, step: Step) -> "subprocess.CompletedProcess[str]":
        try:
            return subprocess.run(
                step.command, capture_output=True, text=True, timeout=self._step_s, check=False
            )
        except FileNotFoundError as error:
            raise RequestRefused(
                f"There is no program '{step.command[0]}' here. Run 'agent-memory serve' under a "
                "supervisor of your own; docs/operations.md says what it must know."
            ) from error
        except subprocess.TimeoutExpired as error:
            raise RequestRefused(
                f"'{' '.join(step.command)}' has not ended after {self._step_s:.0f} s."
            ) from error


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
