"""Starts that are written down, and what is concluded from them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent_memory.store import starts
from agent_memory.store.starts import NUM_KEPT, PAUSE_S, Start, Starts
from tests.source import ROOT

NOW = 1_800_000_000.0


def start(began: float, *, exit: int | None = None, phase: str = "loading") -> Start:
    """One that lasted five seconds."""
    return Start(str(began), 1, "boot", NOW + began, NOW + began + 5, phase, "", 1, exit)


def test_what_was_noted_is_read_by_the_next(tmp_path: Path) -> None:
    first = Starts(tmp_path)
    assert first.previous is None
    first.note("loading", "files")
    first.note("loading", "weights")
    second = Starts(tmp_path)
    previous = second.previous
    assert previous is not None and not previous.clean
    assert (previous.phase, previous.step, previous.pid) == ("loading", "weights", os.getpid())
    assert previous.peak_rss_bytes > 1 << 20 and abs(previous.last - time.time()) < 10
    second.note("ready")
    second.end(0)
    third = Starts(tmp_path)
    assert third.previous is not None
    assert (third.previous.clean, third.previous.phase, third.previous.exit) == (True, "ready", 0)
    assert [one.clean for one in third.before] == [False, True]


def test_a_phase_that_lasts_takes_one_line(tmp_path: Path) -> None:
    here = Starts(tmp_path)
    here.note("ready")
    [before] = starts.read(tmp_path / "starts.jsonl")
    time.sleep(0.01)
    for _ in range(50):
        here.still()
    lines = (tmp_path / "starts.jsonl").read_text().splitlines()
    assert [json.loads(line)["phase"] for line in lines] == ["started", "ready"]
    [after] = starts.read(tmp_path / "starts.jsonl")
    assert after.last > before.last


def test_the_file_is_bounded(tmp_path: Path) -> None:
    for _ in range(3 * NUM_KEPT):
        here = Starts(tmp_path)
        for phase in ("loading", "ready", "draining"):
            here.note(phase)
        here.end(0)
    assert len(Starts(tmp_path).before) == NUM_KEPT
    assert len((tmp_path / "starts.jsonl").read_text().splitlines()) <= 3 * NUM_KEPT + 1


def test_what_is_no_line_of_ours_is_passed_over(tmp_path: Path) -> None:
    Starts(tmp_path).end(0)
    path = tmp_path / "starts.jsonl"
    whole = path.read_text()
    for odd in ("", "{", "[]", "null", '{"run": 1}', "\0" * 50, whole.splitlines()[0][:40]):
        path.write_text(f"{odd}\n{whole}{odd}")
        assert [one.clean for one in Starts(tmp_path).before] == [True]
    line = json.loads(whole.splitlines()[0])
    for field in line:
        path.write_text(f"{json.dumps(line | {field: [], 'run': 'another'})}\n{whole}")
        before = Starts(tmp_path).before
        assert [one.clean for one in before if one.run == line["run"]] == [True]
        assert starts.num_unclean(before, 0.0) == 0


def test_a_disk_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "starts.jsonl").mkdir()
    here = Starts(tmp_path)
    here.note("loading")
    here.end(0)
    assert here.before == [] and here.held_for_s() == 0


@pytest.mark.parametrize(
    ("before", "held"),
    [
        ([], False),
        ([start(-30), start(-20)], False),
        ([start(-40), start(-30), start(-20)], True),
        ([start(-640), start(-30), start(-20)], False),  # not within ten minutes
        ([start(-40), start(-30, exit=0), start(-20)], False),
        ([start(-50), start(-40), start(-30, exit=0), start(-20)], True),
        ([start(-40, exit=70), start(-30), start(-20)], True),  # not in order is bad, too
        ([start(-40, exit=73), start(-30), start(-20)], False),  # it never came to serve
        ([start(-40), start(-30), start(-20), start(-10, phase="crash_loop")], True),
        ([start(-2000), start(-1990), start(-1980)], False),  # half an hour ago
        ([start(40), start(30), start(20)], False),  # the clock went back
    ],
)
def test_three_bad_ends_within_ten_minutes(before: list[Start], held: bool) -> None:
    held_s = starts.held_for_s(before, 0, NOW)
    assert (held_s > 0) == held and held_s <= PAUSE_S


def test_reset_forgives_what_was_before_it(tmp_path: Path) -> None:
    for _ in range(3):
        Starts(tmp_path).note("loading")
    here = Starts(tmp_path)
    assert PAUSE_S - 60 < here.held_for_s() <= PAUSE_S and here.num_unclean() == 3
    starts.forgive(tmp_path)
    assert here.held_for_s() == 0
    (tmp_path / "reset").write_text("nonsense")
    assert here.held_for_s() > 0


KILLED = """
import os, signal, sys
from pathlib import Path
from agent_memory.store.starts import Starts
starts = Starts(Path(sys.argv[1]))
n = 0
while True:
    n += 1
    starts.note("loading", f"layer {n}")
    if n == 500:
        print("going", flush=True)
"""


def test_killed_while_it_writes(tmp_path: Path) -> None:
    for n in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, tmp_path], stdout=subprocess.PIPE, cwd=ROOT
        ) as child:
            assert child.stdout is not None and child.stdout.readline()
            time.sleep(0.003 * n)
            child.send_signal(signal.SIGKILL)
    before = Starts(tmp_path).before
    assert len(before) == 5 and not any(one.clean for one in before)
    assert {one.phase for one in before} <= {"started", "loading"}
