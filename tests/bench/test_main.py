"""The command as people run it, with one tiny part, real servers and signals."""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from agent_memory.bench.servers import MLX_LM, OURS
from agent_memory.ops.agent_client import AgentClient
from agent_memory.ops.client import Client
from agent_memory.ops.process import ServerProcess
from agent_memory.processes import output
from tests.source import ROOT

BENCH = (
    sys.executable,
    "-m",
    "tests.bench.tiny_command",
    "bench",
    "--model",
    "builtin",
    "--only",
    "tiny",
)
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


def environ(temp: Path) -> dict[str, str]:
    """Temporary files go to `temp`, but for MLX's compiled kernels, which take long to make anew.

    No setting comes from outside.
    """
    kernels = Path(tempfile.gettempdir(), "mlx")
    kernels.mkdir(exist_ok=True)
    (temp / "mlx").symlink_to(kernels)
    kept = {name: text for name, text in os.environ.items() if "AGENT_MEMORY" not in name}
    return kept | {"HOME": str(temp), "TMPDIR": str(temp), "PYTHONPATH": str(ROOT)}


def bench(temp: Path, *flags: str, **more: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*BENCH, "--out", str(temp / "out"), *flags],
        env=environ(temp) | more,
        capture_output=True,
        text=True,
        timeout=100,
    )


def left_in(temp: Path) -> list[Path]:
    return [path for path in temp.iterdir() if path.name.startswith("agent-memory")]


def below(pid: int) -> set[int]:
    """Processes that it started, and those that they did."""
    parents: dict[int, int] = {}
    for line in output("ps", "-A", "-o", "pid=,ppid=").splitlines():
        child, parent = line.split()
        parents[int(child)] = int(parent)
    found = {pid}
    while more := {c for c, p in parents.items() if p in found and c not in found}:
        found |= more
    return found - {pid}


@pytest.mark.slow
def test_results_are_files_and_tables(tmp_path: Path) -> None:
    done = bench(tmp_path, "--mode", "quick")
    assert done.returncode == 0, done.stderr
    assert "A tiny part, about 5 s" in done.stderr.splitlines()
    assert "First token" in done.stdout and "agent-memory" in done.stdout
    assert "latest.md" in done.stdout
    found = json.loads((tmp_path / "out" / "latest.json").read_text())
    [measured] = found["tiny"]["measured"]
    assert set(measured["values"]) == {OURS, f"{MLX_LM} 2048"}
    assert found["kv_bits"] == "8"
    assert found["mode"] == "quick" and found["machine"]["versions"]["mlx"]
    assert "## A tiny part" in (tmp_path / "out" / "latest.md").read_text()
    assert not left_in(tmp_path)


@pytest.mark.slow
def test_for_programs_there_is_nothing_but_json(tmp_path: Path) -> None:
    done = bench(tmp_path, "--mode", "quick", "--json", "--keep")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "out" / "latest.json").read_text())
    [kept] = left_in(tmp_path)
    assert list(kept.glob("server-*.log"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_neither_servers_nor_files(tmp_path: Path, number: int) -> None:
    # What a shell starts in the background is told to ignore SIGINT, and passes that on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        [*BENCH, "--mode", "full", "--out", str(tmp_path / "out")],
        env=environ(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 60
        while len(started := below(process.pid)) < 3 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(number)
        time.sleep(0.2)
        process.send_signal(number)  # who is impatient does not keep servers from being ended
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted" in errors and "Traceback" not in errors
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not left_in(tmp_path)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_a_server_that_runs_already_is_left_as_it_was(tmp_path: Path) -> None:
    flags = ["--state-dir", str(tmp_path / "state")]
    with ServerProcess(flags, tmp_path / "server.log") as server, Client(server.port) as client:
        server.wait_loaded()
        client.chat("ada", [{"role": "user", "content": "My city is Lisbon."}], 4)
        url = f"http://127.0.0.1:{server.port}"
        done = bench(tmp_path, "--mode", "normal", "--url", url)
        assert done.returncode == 0, done.stderr
        with AgentClient(url) as agents:
            assert [agent["id"] for agent in agents.agents()] == ["ada"]
        found = json.loads((tmp_path / "out" / "latest.json").read_text())
        assert found["url"] == url and found["models"] == ["builtin"]
        [measured] = found["tiny"]["measured"]
        assert list(measured["values"]) == [OURS] and len(measured["values"][OURS]) == 2
        other = bench_again(tmp_path, "--url", url, "--model", "other")
    assert other.returncode == 64 and "It has: builtin." in other.stderr


def bench_again(temp: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    (temp / "mlx").unlink()
    return bench(temp, *flags)


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--only", "tiny,other"), 64, "There is no part other. Parts: tiny, here."),
        SLOW(("--only", "here", "--url", "http://127.0.0.1:9"), 64, "What can: tiny."),
        SLOW(("--url", "http://127.0.0.1:9"), 69, "127.0.0.1:9"),
        SLOW(("--url", "http://127.0.0.1:9", "--kv-bits", "8"), 64, "leave out"),
        SLOW(("--peer", "name"), 64, "Allowed: NAME=COMMAND"),
        SLOW(("--out", "/dev/null/results"), 64, "--out"),
    ],
)
def test_what_cannot_be_done_is_said(
    tmp_path: Path, flags: tuple[str, ...], code: int, said: str
) -> None:
    done = bench(tmp_path, "--mode", "quick", *flags)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert said in done.stderr
    assert not left_in(tmp_path)


@pytest.mark.slow
def test_a_server_that_does_not_start_is_quoted(tmp_path: Path) -> None:
    command = f"other={sys.executable} -c 'raise SystemExit(\"it has no legs\")' {{port}}"
    done = bench(tmp_path, "--mode", "quick", "--peer", command)
    assert done.returncode == 70
    assert "other did not start" in done.stderr and "it has no legs" in done.stderr
    assert "Traceback" not in done.stderr
    assert not left_in(tmp_path)
