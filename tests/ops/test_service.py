"""What launchd and systemd are given and told; their programs are stood in for by ones that write
down what they were called with."""

import os
import plistlib
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from agent_memory import cli
from agent_memory.ops.service import KINDS, START_S, Launchd, Systemd
from agent_memory.stages import BUDGETS_S, supervisor_s
from tests.process import Server

RECORD = """#!/bin/sh
echo "$(basename "$0") $*" >> "$HOME/calls"
for word in $FAILING; do case "$*" in *$word*) echo "not now" >&2; exit 5;; esac; done
echo "it is well"
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """With a bin/ whose launchctl and systemctl note what they are told."""
    (tmp_path / "bin").mkdir()
    for name in ("launchctl", "systemctl"):
        (tmp_path / "bin" / name).write_text(RECORD)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def service(home: Path, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AGENT_MEMORY_", "XDG_"))}
    path = f"{home / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(
        [sys.executable, "-m", "agent_memory", "service", *args],
        env={**kept, "HOME": str(home), "PATH": path, **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


def calls(home: Path) -> list[str]:
    """Since the last time."""
    file = home / "calls"
    said = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return said


DOMAIN = f"gui/{os.getuid()}"
LAUNCHD = {
    "install": [
        f"launchctl bootstrap {DOMAIN} {{path}}",
        f"launchctl kickstart {DOMAIN}/agent-memory",
    ],
    "start": [
        f"launchctl bootstrap {DOMAIN} {{path}}",
        f"launchctl kickstart {DOMAIN}/agent-memory",
    ],
    "status": [f"launchctl print {DOMAIN}/agent-memory"],
    "stop": [f"launchctl bootout {DOMAIN}/agent-memory"],
    "uninstall": [f"launchctl bootout {DOMAIN}/agent-memory"],
}
SYSTEMD = {
    "install": [
        "systemctl --user daemon-reload",
        "systemctl --user enable --now agent-memory.service",
    ],
    "start": ["systemctl --user start agent-memory.service"],
    "status": ["systemctl --user status --no-pager agent-memory.service"],
    "stop": ["systemctl --user stop agent-memory.service"],
    "uninstall": [
        "systemctl --user disable --now agent-memory.service",
        "systemctl --user daemon-reload",
    ],
}


@pytest.mark.parametrize(
    ("kind", "told"), [("launchd", LAUNCHD), ("systemd", SYSTEMD)], ids=["launchd", "systemd"]
)
def test_what_each_is_told(kind: str, told: Mapping[str, list[str]], home: Path) -> None:
    path = KINDS[kind](home).path
    for verb, expected in told.items():
        done = service(home, verb, "--kind", kind)
        assert done.returncode == 0, done.stderr
        assert calls(home) == [call.format(path=path) for call in expected]
        assert path.exists() == (verb != "uninstall")
    assert "is still there" in done.stdout
    for verb in ("start", "stop", "status", "uninstall"):
        gone = service(home, verb, "--kind", kind)
        assert gone.returncode == 64 and "service install" in gone.stderr
    assert not calls(home)


def test_print_writes_nothing_and_calls_nobody(home: Path) -> None:
    for kind in KINDS:
        done = service(home, "install", "--print", "--kind", kind)
        assert done.returncode == 0 and "agent_memory" in done.stdout
        assert not KINDS[kind](home).path.exists() and not calls(home)


def test_what_is_there_is_replaced_only_on_demand(home: Path) -> None:
    assert service(home, "install", "--kind", "systemd").returncode == 0
    again = service(home, "install", "--kind", "systemd")
    assert again.returncode == 64 and "--force" in again.stderr
    calls(home)
    assert service(home, "install", "--kind", "systemd", "--force").returncode == 0
    disabled, _, enabled = calls(home)
    assert "disable" in disabled and "enable" in enabled


def test_a_supervisor_that_says_no_is_quoted(home: Path) -> None:
    refused = service(home, "install", "--kind", "launchd", FAILING="kickstart")
    assert refused.returncode == 1 and "failed with 5: not now" in refused.stderr
    assert service(home, "install", "--kind", "launchd").returncode == 0
    assert service(home, "start", "--kind", "launchd", FAILING="bootstrap").returncode == 0
    assert service(home, "status", "--kind", "launchd", FAILING="print").returncode == 5
    alone = service(home, "status", "--kind", "launchd", PATH="/nowhere")
    assert alone.returncode == 1 and "docs/operations.md" in alone.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_what_no_supervisor_takes_is_not_left_behind(kind: str, home: Path) -> None:
    """So that it can be installed when there is one, or the reason has gone."""
    alone = service(home, "install", "--kind", kind, PATH="/nowhere")
    assert alone.returncode == 1 and "There is no program" in alone.stderr
    assert not KINDS[kind](home).path.exists()
    begins = {"launchd": "kickstart", "systemd": "enable"}[kind]
    refused = service(home, "install", "--kind", kind, FAILING=begins)
    assert refused.returncode == 1 and "failed with 5: not now" in refused.stderr
    assert not KINDS[kind](home).path.exists()
    assert (
        calls(home)[-len(SYSTEMD["uninstall"]) :]
        == {
            "launchd": [f"launchctl kickstart {DOMAIN}/agent-memory", *LAUNCHD["uninstall"]],
            "systemd": SYSTEMD["uninstall"],
        }[kind]
    )
    assert service(home, "install", "--kind", kind).returncode == 0


@pytest.mark.requirement("L-34", "L-36")
def test_the_launch_agent_waits_longer_than_the_stages_take(home: Path) -> None:
    text = service(home, "install", "--print", "--kind", "launchd").stdout
    agent = plistlib.loads(text.encode())
    assert agent["ExitTimeOut"] == 60 >= 25 + sum(BUDGETS_S.values()) + 10
    assert agent["KeepAlive"] == {"SuccessfulExit": False} and agent["ThrottleInterval"] == 30
    assert agent["ProgramArguments"][1:4] == ["-m", "agent_memory", "serve"]
    assert agent["StandardErrorPath"] == str(home / "Library/Logs/agent-memory.log")
    assert agent["Umask"] == 0o077
    assert Launchd(home).stop_s(text) == 60


def test_numbers_follow_the_settings(home: Path) -> None:
    """Also a path that needs quotes."""
    odd = home / 'my "100%" $settings.toml'
    odd.write_text("drain_timeout = 300\n")
    flags = ("install", "--print", "--config", str(odd), "--state-dir", str(home / "a b"))
    unit = service(home, *flags, "--kind", "systemd").stdout
    assert Systemd(home).stop_s(unit) == supervisor_s(300) == 335
    words = Systemd(home).command(unit)
    assert words[-4:] == ["--config", str(odd), "--state-dir", f"{home}/a b"]
    assert f'--config "{home}/my \\"100%%\\" $$settings.toml" --state-dir "{home}/a b"' in unit
    agent = service(home, *flags, "--kind", "launchd").stdout
    assert Launchd(home).stop_s(agent) == 335 and Launchd(home).command(agent) == words


@pytest.mark.parametrize("drain_timeout", [25, 300])
def test_a_command_waits_longer_than_its_supervisor(
    drain_timeout: int, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the service was installed: settings may have changed since."""
    settings = home / "settings.toml"
    settings.write_text(f"drain_timeout = {drain_timeout}\n")
    flags = ("--config", str(settings), "--kind", "systemd")
    assert service(home, "install", *flags).returncode == 0
    settings.unlink()
    waits = list[float]()

    def noted(command: tuple[str, ...], *, timeout: float, **_how: object) -> object:
        waits.append(timeout)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(subprocess, "run", noted)
    for verb in ("start", "stop", "uninstall"):
        assert cli.main(["service", verb, "--kind", "systemd"]) == 0
    assert waits and min(waits) > max(START_S, supervisor_s(drain_timeout))


def test_settings_of_this_shell_are_none_of_the_services(home: Path) -> None:
    here = {"AGENT_MEMORY_DRAIN_TIMEOUT": "300", "AGENT_MEMORY_MODEL": "org/m"}
    done = service(home, "install", "--print", "--kind", "launchd", **here)
    assert Launchd(home).stop_s(done.stdout) == 60
    assert all(name in done.stderr for name in here) and "config.toml" in done.stderr


@pytest.mark.parametrize(
    "text", ["", "nonsense", "<plist", "TimeoutStopSec=\n", 'ExecStart="\n', "\0"]
)
def test_a_file_that_is_none_of_ours_names_nothing(text: str, tmp_path: Path) -> None:
    for kind in (Launchd(tmp_path), Systemd(tmp_path)):
        assert kind.stop_s(text) is None and kind.command(text) == []


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd")
@pytest.mark.requirement("L-34", "L-36")
def test_systemd_understands_the_unit(home: Path) -> None:
    unit = home / "agent-memory.service"
    unit.write_text(service(home, "install", "--print", "--kind", "systemd").stdout)
    done = subprocess.run(
        ["systemd-analyze", "--user", "verify", str(unit)],
        env={**os.environ, "XDG_RUNTIME_DIR": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    newer = ("RestartSteps", "RestartMaxDelaySec")  # before systemd 254 they are passed over
    complaints = [line for line in done.stderr.splitlines() if not any(n in line for n in newer)]
    assert done.returncode == 0 and not [line for line in complaints if unit.name in line]


@pytest.mark.parametrize("flag", ["--state-dir", "--config"])
def test_launchd_is_told_to_forget_it_when_the_server_has_ended(flag: str, home: Path) -> None:
    """Which server that is the installed file says, itself or in the settings it names."""
    with Server(home).wait_ready() as server:
        file = home / "settings.toml"
        file.write_text(f"state_dir = '{server.state_dir}'\n")
        value = {"--state-dir": str(server.state_dir), "--config": str(file)}[flag]
        assert service(home, "install", "--kind", "launchd", flag, value).returncode == 0
        calls(home)
        done = service(home, "stop", "--kind", "launchd")
        assert done.returncode == 0 and calls(home) == LAUNCHD["stop"]
        assert server.wait(0.5) == 0


def test_systemd_hears_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with Server(tmp_path).wait_ready() as server:
            heard = hear_until(listener, "WATCHDOG=1")
            server.signal()
            assert server.wait(30) == 0
        heard += hear_until(listener, "STATUS=release_memory")
    told = [line for message in heard for line in message.splitlines()]
    order = ["STATUS=loading", "READY=1", "WATCHDOG=1", "STOPPING=1", "STATUS=drain"]
    places = [told.index(line) for line in order]
    assert places == sorted(places)
    extended = [int(line.split("=")[1]) for line in told if line.startswith("EXTEND_TIMEOUT")]
    assert len(extended) == len(BUDGETS_S) and min(extended) > 10_000_000


def hear_until(listener: socket.socket, line: str) -> list[str]:
    heard: list[str] = []
    while not heard or line not in heard[-1]:
        heard.append(listener.recv(4096).decode())
    return heard
