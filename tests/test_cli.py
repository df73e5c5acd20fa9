"""The command as people type it: a real process each time."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from agent_memory import __version__
from agent_memory.store.state_dir import StateDir

SCRIPT = Path(sys.executable).with_name("agent-memory")


def run(home: Path, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """`python -m agent_memory` with a home of its own and no setting from outside."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("AGENT_MEMORY_")}
    return subprocess.run(
        [sys.executable, "-m", "agent_memory", *args],
        env=kept | {"HOME": str(home)} | environ,
        capture_output=True,
        text=True,
        timeout=20,
    )


def test_version_and_help(tmp_path: Path) -> None:
    assert run(tmp_path, "--version").stdout == f"agent-memory {__version__}\n"
    top = run(tmp_path, "--help")
    assert top.returncode == 0 and "serve" in top.stdout and "demo" in top.stdout
    assert "--kv-bits" in run(tmp_path, "serve", "--help").stdout


def test_help_is_quick_because_nothing_heavy_is_imported(tmp_path: Path) -> None:
    top = run(tmp_path, "--help", PYTHONPROFILEIMPORTTIME="1")
    imported = set(re.findall(r"\| +(\S+)$", top.stderr, re.MULTILINE))
    assert "agent_memory.config" in imported
    assert not imported & {"mlx", "mlx.core", "numpy", "asyncio", "starlette", "hypercorn", "httpx"}


@pytest.mark.requirement("L-13")
@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "COMMAND"),
        (("fly",), "'fly'"),
        (("serve", "--colour"), "--colour"),
        (("serve", "--port", "70000"), "--port: '70000' cannot be used. Allowed: 0 to 65535"),
        (("serve", "--kv-bits", "3"), "--kv-bits: '3' cannot be used. Allowed: 4, 8 or none."),
        (("demo", "--kv-bits", "3"), "--kv-bits"),
        (("stop", "--timeout", "nan"), "--timeout: 'nan' cannot be used. Allowed: 0 to 86400."),
        (("stop", "--timeout=-1"), "--timeout: '-1' cannot be used."),
        (("serve", "--api-keys-file", "~nobody.here/k"), "--api-keys-file"),
    ],
)
def test_a_wrong_command_line_exits_64_with_the_usage(
    tmp_path: Path, args: tuple[str, ...], said: str
) -> None:
    done = run(tmp_path, *args)
    assert done.returncode == 64
    assert said in done.stderr and "usage: agent-memory" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.requirement("L-13", "S-05")
def test_a_bad_setting_exits_78_naming_its_place(tmp_path: Path) -> None:
    done = run(tmp_path, "serve", AGENT_MEMORY_PORT="http")
    assert done.returncode == 78
    assert done.stderr == (
        "agent-memory: AGENT_MEMORY_PORT: 'http' cannot be used. "
        "Allowed: 0 to 65535; 0 takes a free one.\n"
    )
    assert run(tmp_path, "serve", "--host", "0.0.0.0").returncode == 78


@pytest.mark.requirement("L-13")
def test_a_state_directory_that_cannot_be_exits_73(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run(tmp_path, "serve", "--no-preload", "--state-dir", str(tmp_path / "file"))
    assert done.returncode == 73
    assert str(tmp_path / "file") in done.stderr and "Traceback" not in done.stderr


@pytest.mark.requirement("L-13")
def test_a_taken_state_directory_exits_75_naming_the_holder(tmp_path: Path) -> None:
    held = StateDir.open(tmp_path / "state")
    try:
        done = run(tmp_path, "serve", "--no-preload", AGENT_MEMORY_STATE_DIR=str(held.path))
    finally:
        held.close()
    assert done.returncode == 75
    assert str(os.getpid()) in done.stderr and "Traceback" not in done.stderr


@pytest.mark.requirement("L-13", "L-14", "F-17")
def test_a_taken_port_exits_69_before_a_model_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        args = ("--port", port, "--state-dir", str(tmp_path / "state"), "--log-format", "json")
        done = run(tmp_path, "serve", "--no-preload", *args)
    assert done.returncode == 69
    assert f"Port {port} of 127.0.0.1 is taken." in done.stderr and "--port" in done.stderr
    assert "model_loading" not in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "state" / "index.db").exists()


def test_a_command_that_is_interrupted_exits_130_without_a_word(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, "-m", "agent_memory", "agents", "ls", "--url", url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as asking:
            silent.settimeout(20)
            connection, _ = silent.accept()
            with connection:
                connection.recv(1)
                asking.send_signal(signal.SIGINT)
                said, _ = asking.communicate(timeout=20)
    assert (asking.returncode, said) == (130, b"")


@pytest.mark.requirement("L-11")
@pytest.mark.skipif(not SCRIPT.exists(), reason="the package is not installed here")
def test_the_installed_command_is_the_module(tmp_path: Path) -> None:
    done = subprocess.run(
        [SCRIPT, "--version"], cwd=tmp_path, capture_output=True, text=True, timeout=20
    )
    assert done.stdout == f"agent-memory {__version__}\n"
