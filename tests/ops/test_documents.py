"""What docs/operations.md says is so."""

import re

from agent_memory.engine.heartbeat import FLOOR_S, TIMES_P99, Trouble
from agent_memory.engine.phase import Phase
from agent_memory.metrics import Metrics
from agent_memory.ops.checks import CHECKS
from agent_memory.ops.service import NEVER_AGAIN, THROTTLE_S, WATCHDOG_S, Systemd
from agent_memory.stages import PROMISE_S, RESERVE_S
from agent_memory.store.starts import NUM_KEPT, PAUSE_S, WITHIN_S
from tests.source import ROOT

TEXT = (ROOT / "docs/operations.md").read_text("utf-8")


def section(title: str) -> str:
    return TEXT.split(f"## {title}\n")[1].split("\n## ")[0]


def first_cells(text: str) -> list[str]:
    return re.findall(r"^\| `(.*)` \|", text, re.MULTILINE)


def test_every_reason_is_explained() -> None:
    known = {"queue_full", "memory_pressure", *Trouble}
    known |= {str(phase) for phase in Phase} - {"starting", "ready", "stopped"}
    table = section("Is it well?").split("| `reason` |")[1]
    assert set(first_cells(table)) == known
    assert f"for {FLOOR_S:.0f} s, or for {TIMES_P99} times" in table


def test_every_check_is_explained() -> None:
    listed = re.findall(
        r"`([a-z ]+)`", "".join(re.findall(r"^\| (.*?) \|", section("Doctor"), re.M))
    )
    assert listed == list(CHECKS)


def test_numbers_are_those_of_the_program() -> None:
    assert f"the last {NUM_KEPT} starts" in TEXT
    assert (WITHIN_S, PAUSE_S) == (600, 1800)  # ten minutes, 30 minutes
    assert f"drain time-out + {PROMISE_S:.0f} s + {RESERVE_S:.0f} s" in TEXT
    assert f"at most every {THROTTLE_S} s" in TEXT and f"WatchdogSec={WATCHDOG_S}" in TEXT
    codes = re.search(r"ended with 0, ([\d, or]+);", TEXT)
    assert codes and tuple(map(int, re.findall(r"\d+", codes[1]))) == NEVER_AGAIN
    assert "RestartMaxDelaySec=300" in Systemd(ROOT).text([], 25)


def test_every_metric_to_be_woken_for_exists() -> None:
    exported = Metrics().text().decode()
    table = section("What to be woken for")
    names = re.findall(
        r"\b[a-z]+(?:_[a-z]+)+\b|\b(?:running|waiting)\b", " ".join(first_cells(table))
    )
    assert len(names) >= 8
    for name in names:
        assert f" agent_memory_{name.removesuffix('_total')}" in exported
