"""status and stop, beside real servers in every phase."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from agent_memory.ops.running import Running, figures
from agent_memory.store.state_dir import StateDir
from tests.process import ENDLESS, Server


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "agent_memory", *command, "--state-dir", str(folder / "state")],
        capture_output=True,
        text=True,
        timeout=60,
    )


def status(folder: Path) -> tuple[int, dict[str, Any]]:
    done = run(folder, "status", "--json")
    found: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, found


@pytest.mark.requirement("L-33")
def test_of_a_ready_server_and_of_none(tmp_path: Path) -> None:
    none = run(tmp_path, "status")
    assert none.returncode == 69 and "No server is running" in none.stderr
    assert run(tmp_path, "stop").returncode == 0
    with Server(tmp_path).wait_ready() as server:
        used = server.ask("Hello", agent="ann").json()["usage"]["total_tokens"]
        server.wait_on_disk("ann", used)
        code, found = status(tmp_path)
        assert code == 0 and found["running"] and found["answers"]
        assert (found["pid"], found["url"]) == (server.pid, server.url)
        assert (found["phase"], found["reason"], found["model"]) == ("ready", None, "builtin")
        assert (found["agents"], found["context_length"]) == (1, 8192)
        memory = found["memory"]
        assert 0 < memory["memory_used_bytes"] < memory["memory_budget_bytes"]
        assert memory["disk_bytes"] > 0 and memory["peak_rss_bytes"] > 1 << 20
        assert found["ages"]["up_s"] > 0 and found["ages"]["last_turn_s"] >= 0
        words = run(tmp_path, "status").stdout
        assert str(server.pid) in words and "builtin, context 8,192" in words
        stopped = run(tmp_path, "stop", "--json")
        assert stopped.returncode == 0, stopped.stderr
        assert json.loads(stopped.stdout)["clean"] and "release_memory" in stopped.stderr
        assert server.wait(0.5) == 0  # it was gone before `stop` was
    code, found = status(tmp_path)
    assert (code, found["running"], found["last"]["exit"]) == (69, False, 0)


def test_of_one_that_loads_then_drains(tmp_path: Path) -> None:
    with Server(tmp_path, failpoint="engine.load:2") as server, ThreadPoolExecutor(1) as pool:
        server.wait_until(lambda: bool(server.events("model_loading")))
        code, found = status(tmp_path)
        assert (code, found["phase"], found["reason"]) == (1, "loading", "loading")
        assert found["step"] in ("files", "weights", "fingerprint", "self-test")
        server.wait_ready()
        answer = pool.submit(server.stream, ENDLESS)
        server.wait_until(lambda: server.metric("running") == 1)
        late = run(tmp_path, "stop", "--timeout", "1")
        assert late.returncode == 1
        assert "after 1 s, at 'drain'" in late.stderr and "kill -9" in late.stderr
        code, found = status(tmp_path)
        assert (code, found["phase"], found["reason"]) == (1, "draining", "draining")
        assert run(tmp_path, "stop").returncode == 0  # the second signal ends the drain
        answer.result(10)


def test_of_one_that_answers_nobody_any_more(tmp_path: Path) -> None:
    with Server(tmp_path, failpoint="shutdown.persist:block").wait_ready() as server:
        server.signal()
        server.wait_until(lambda: status(tmp_path)[1]["phase"] == "persist")
        code, found = status(tmp_path)
        assert (code, found["answers"]) == (1, False)
        late = run(tmp_path, "stop", "--timeout", "0.5")
        assert late.returncode == 1 and "at 'persist'" in late.stderr
        server.signal(signal.SIGKILL)
        assert server.wait(5) == -signal.SIGKILL
    assert "ended badly at 'persist'" in run(tmp_path, "status").stderr


def test_one_that_ends_badly_meanwhile_is_told(tmp_path: Path) -> None:
    with Server(tmp_path, failpoint="shutdown.persist").wait_ready():
        stopped = run(tmp_path, "stop")
        assert stopped.returncode == 70 and "not in order" in stopped.stdout


@pytest.mark.requirement("L-33")
def test_a_process_that_only_has_the_number_is_not_touched(tmp_path: Path) -> None:
    """The lock of a server that was killed names a process that is somebody else by now."""
    state_dir = StateDir.open(tmp_path / "state")
    state_dir.sign("http://127.0.0.1:1", 40)
    signed = (state_dir.path / "LOCK").read_text()
    state_dir.close()
    with subprocess.Popen(["sleep", "60"]) as stranger:
        (state_dir.path / "LOCK").write_text(signed.replace(str(os.getpid()), str(stranger.pid), 1))
        assert Running.find(state_dir.path) is None
        stopped = run(tmp_path, "stop")
        assert stopped.returncode == 0 and "No server is running" in stopped.stdout
        time.sleep(0.1)
        assert stranger.poll() is None
        stranger.kill()


@pytest.mark.requirement("L-33")
def test_who_holds_the_directory_and_is_no_server_is_left_alone(tmp_path: Path) -> None:
    state_dir = StateDir.open(tmp_path / "state")
    refused = run(tmp_path, "stop")
    assert refused.returncode == 1 and "is no server" in refused.stderr
    code, found = status(tmp_path)
    assert (code, found["pid"], found["url"]) == (1, os.getpid(), None)
    state_dir.close()


def test_figures_are_read_from_metrics() -> None:
    text = '# HELP x\nagent_memory_running 2.0\nagent_memory_requests_total{reason="a b"} 3.0\n'
    assert figures(text) == {"running": 2.0}
