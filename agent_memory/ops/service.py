"""The files by which launchd and systemd keep a server running, and what they are told.

Knows both formats, where they lie and which programs drive them.  The seconds a supervisor waits
before it kills come from stages.py, with a reserve.  Runs nothing.  Any thread.
"""

import os
import plistlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from xml.parsers.expat import ExpatError

from agent_memory.stages import supervisor_s

LABEL = "agent-memory"
OPEN_FILES = 8192
THROTTLE_S = 30
START_S = 120
WATCHDOG_S = 120
NEVER_AGAIN = (64, 73, 75, 78)
"""Exit statuses that the next start would only repeat."""


@dataclass(frozen=True, slots=True)
class Step:
    """A program to run.  `must`: its failing is ours."""

    command: tuple[str, ...]
    must: bool = True


class Launchd:
    """A launch agent of this user.  launchd knows no limit of restarts: the server itself loads no
    model when it has died too often."""

    name = "launchd"

    def __init__(self, home: Path) -> None:
        self.path = home / "Library" / "LaunchAgents" / f"{LABEL}.plist"
        self.log = home / "Library" / "Logs" / f"{LABEL}.log"
        self._domain = f"gui/{os.getuid()}"
        self._target = f"{self._domain}/{LABEL}"

    def text(self, command: list[str], drain_timeout_s: float) -> str:
        agent = {
            "Label": LABEL,
            "ProgramArguments": command,
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},
            "ThrottleInterval": THROTTLE_S,
            "ExitTimeOut": supervisor_s(drain_timeout_s),
            "ProcessType": "Interactive",
            "SoftResourceLimits": {"NumberOfFiles": OPEN_FILES},
            "Umask": 0o077,
            "StandardOutPath": str(self.log),
            "StandardErrorPath": str(self.log),
        }
        return plistlib.dumps(agent, sort_keys=False).decode()

    def stop_s(self, text: str) -> float | None:
        """What is waited for before a kill; None if the file is none of ours."""
        try:
            return float(plistlib.loads(text.encode())["ExitTimeOut"])
        except (plistlib.InvalidFileException, ExpatError, ValueError, KeyError, TypeError):
            return None

    def command(self, text: str) -> list[str]:
        """What is run; [] if the file is none of ours."""
        try:
            return [str(word) for word in plistlib.loads(text.encode())["ProgramArguments"]]
        except (plistlib.InvalidFileException, ExpatError, ValueError, KeyError, TypeError):
            return []

    def start(self) -> list[Step]:
        load = ("launchctl", "bootstrap", self._domain, str(self.path))
        return [Step(load, must=False), Step(("launchctl", "kickstart", self._target))]

    def stop(self) -> list[Step]:
        """After the process has ended: else it would be given less time than it needs."""
        return [Step(("launchctl", "bootout", self._target), must=False)]

    def install(self) -> list[Step]:
        return self.start()

    def uninstall(self) -> list[Step]:
        return self.stop()

    def removed(self) -> list[Step]:
        return []

    def status(self) -> Step:
        return Step(("launchctl", "print", self._target))


class Systemd:
    """A user unit."""

    name = "systemd"

    def __init__(self, home: Path) -> None:
        configs = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
        self._unit = f"{LABEL}.service"
        self.path = configs / "systemd" / "user" / self._unit

    def text(self, command: list[str], drain_timeout_s: float) -> str:
        return f"""\
[Unit]
Description=agent-memory, an LLM server that remembers its agents
StartLimitIntervalSec=3600
StartLimitBurst=10

[Service]
Type=notify
NotifyAccess=main
ExecStart={" ".join(map(_quoted, command))}
KillSignal=SIGTERM
KillMode=mixed
TimeoutStartSec={START_S}
TimeoutStopSec={supervisor_s(drain_timeout_s)}
TimeoutStopFailureMode=abort
WatchdogSec={WATCHDOG_S}
Restart=on-failure
RestartSec=5
RestartSteps=5
RestartMaxDelaySec=300
RestartPreventExitStatus={" ".join(map(str, NEVER_AGAIN))}
LimitNOFILE={OPEN_FILES}
UMask=0077
NoNewPrivileges=yes

[Install]
WantedBy=default.target
"""

    def stop_s(self, text: str) -> float | None:
        """As of Launchd.  Seconds alone are understood, as we write them."""
        found = re.search(r"^TimeoutStopSec=(\d+(?:\.\d+)?)s?$", text, re.MULTILINE)
        return float(found[1]) if found else None

    def command(self, text: str) -> list[str]:
        """As of Launchd."""
        found = re.search(r"^ExecStart=(.+)$", text, re.MULTILINE)
        try:
            words = shlex.split(found[1]) if found else []
        except ValueError:
            return []
        return [word.replace("%%", "%").replace("$$", "$") for word in words]

    def start(self) -> list[Step]:
        return [self._do("start", self._unit)]

    def stop(self) -> list[Step]:
        return [self._do("stop", self._unit)]

    def install(self) -> list[Step]:
        return [self._do("daemon-reload"), self._do("enable", "--now", self._unit)]

    def uninstall(self) -> list[Step]:
        return [Step(self._do("disable", "--now", self._unit).command, must=False)]

    def removed(self) -> list[Step]:
        return [self._do("daemon-reload")]

    def status(self) -> Step:
        return self._do("status", "--no-pager", self._unit)

    def _do(self, *words: str) -> Step:
        return Step(("systemctl", "--user", *words))


KINDS = {kind.name: kind for kind in (Launchd, Systemd)}


def _quoted(word: str) -> str:
    """As systemd reads it."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if not re.fullmatch(r"[\w./@:=+,-]+", escaped) else escaped
