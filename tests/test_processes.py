"""Which process a number means."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agent_memory import processes
from agent_memory.store.state_dir import Holder, StateDir


def test_a_process_is_told_from_others_by_its_start() -> None:
    mine = processes.start_of(os.getpid())
    assert mine and mine == processes.start_of(os.getpid())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        theirs = processes.start_of(child.pid)
        assert theirs and theirs != mine
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert processes.start_of(child.pid) == ""  # though nobody has asked for its status yet
    assert processes.start_of(child.pid) == ""


@pytest.mark.skipif(shutil.which("ps") is None, reason="there is no ps")
def test_ps_tells_it_too(tmp_path: Path) -> None:
    mine = processes.start_by_ps(os.getpid())
    assert mine and mine == processes.start_by_ps(os.getpid())
    assert "python" in processes.command_of(os.getpid())
    assert processes.start_by_ps(2**22 + 1) == ""


def test_a_name_with_brackets_is_read_all_the_same(tmp_path: Path) -> None:
    odd = tmp_path / "a) R (b"
    odd.symlink_to(shutil.which("sleep") or "")
    with subprocess.Popen([str(odd), "60"]) as child:
        assert processes.start_of(child.pid).isdigit() or sys.platform == "darwin"
        child.send_signal(signal.SIGKILL)


def test_a_program_that_is_not_there_says_nothing() -> None:
    assert processes.output("no-such-program") == ""


def test_a_number_that_was_given_out_again_is_somebody_else(tmp_path: Path) -> None:
    state_dir = StateDir.open(tmp_path)
    state_dir.sign("http://127.0.0.1:1", 40)
    holder = StateDir.holder(tmp_path)
    assert holder is not None and holder.is_running
    assert (holder.pid, holder.url, holder.stop_s) == (os.getpid(), "http://127.0.0.1:1", 40)
    mine = (holder.pid, holder.started)
    assert not Holder(*mine, holder.boot, "another start", holder.url, 40).is_running
    assert not Holder(*mine, "another boot", holder.start, holder.url, 40).is_running
    assert not Holder(*mine, "", "", "", 0).is_running
    state_dir.close()
    assert StateDir.holder(tmp_path) is None
