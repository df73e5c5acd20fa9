"""Servers that die, and what the next one says and does."""

import signal
from pathlib import Path

import pytest

from agent_memory.store import starts
from tests.process import Server


def die(folder: Path, number: signal.Signals, failpoint: str = "") -> None:
    """A server that is ended by a signal, at once or when it stands at the failpoint."""
    with Server(folder, failpoint=failpoint) as server:
        if failpoint:
            server.wait_until(lambda: bool(server.events("model_loading")))
        server.signal(number)
        assert server.wait(20) == -number


@pytest.mark.requirement("L-38")
def test_the_next_start_says_where_the_last_one_died(tmp_path: Path) -> None:
    die(tmp_path, signal.SIGSEGV, "engine.load:block")
    with Server(tmp_path) as server:
        previous = server.event("previous_run")
        assert previous["unclean"] and not previous["rebooted_since"]
        assert (previous["phase"], previous["step"]) == ("loading", "files")
        assert previous["peak_rss_bytes"] > 1 << 20 and 0 <= previous["ran_s"] < 60
        faults = server.event("previous_faults")["text"]
        assert "Segmentation fault" in faults and "in failpoint" in faults
        server.wait_ready()
        server.signal()
        assert server.wait(20) == 0
    with Server(tmp_path) as server:
        assert not server.events("previous_run") and not server.events("previous_faults")


@pytest.mark.requirement("L-38")
def test_stacks_on_demand(tmp_path: Path) -> None:
    with Server(tmp_path).wait_ready() as server:
        server.signal(signal.SIGUSR1)
        fault_log = server.state_dir / "run" / "fault.log"
        server.wait_until(lambda: "most recent call first" in fault_log.read_text())
        assert "in _run" in fault_log.read_text() and server.get("/readyz").status_code == 200
        assert fault_log.stat().st_mode & 0o777 == 0o600


@pytest.mark.requirement("L-37")
def test_after_three_bad_ends_nothing_is_loaded_until_that_is_forgiven(tmp_path: Path) -> None:
    for _ in range(3):
        die(tmp_path, signal.SIGKILL)
    with Server(tmp_path) as server:
        ready = server.get("/readyz")
        assert (ready.status_code, ready.json()["reason"]) == (503, "crash_loop")
        assert "agent-memory doctor --reset" in ready.json()["failure"]
        assert int(ready.headers["retry-after"]) > 0
        assert server.get("/healthz").status_code == 200
        assert server.metric("unclean_starts") == 3
        refused = server.ask("Hello")
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "crash_loop"
        assert server.get("/v1/agents").status_code == 200
        assert not server.events("model_loading")
        server.signal()
        assert server.wait(20) == 0
    with Server(tmp_path) as server:  # an orderly stop does not make the others any better
        assert server.get("/readyz").json()["reason"] == "crash_loop"
        starts.forgive(server.state_dir / "run")
        server.wait_ready()
        assert server.ask("Hello", max_tokens=1).status_code == 200
