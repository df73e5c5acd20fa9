"""Alive, at rest, at work or standing still: judged from what the thread last noted."""

import time

import pytest

from agent_memory import failpoint
from agent_memory.engine.heartbeat import TIMES_P99, Heartbeat, Trouble


@pytest.fixture
def heartbeat(monkeypatch: pytest.MonkeyPatch) -> Heartbeat:
    """One that takes a tenth of a second for long."""
    monkeypatch.setenv(failpoint.VARIABLE, "engine.stall:0.1")
    return Heartbeat()


def test_at_rest_it_may_be_silent_for_ever(heartbeat: Heartbeat) -> None:
    heartbeat.turned(rests=True)
    time.sleep(0.15)
    assert heartbeat.trouble(may_stall=True) is None
    assert heartbeat.turn_age_s > 0.1
    heartbeat.woken()
    assert heartbeat.trouble(may_stall=True) is None  # its time begins with the work
    time.sleep(0.15)
    assert heartbeat.trouble(may_stall=True) is Trouble.STALLED


def test_work_without_a_turn_is_a_stall_until_the_next_turn(heartbeat: Heartbeat) -> None:
    heartbeat.woken()
    time.sleep(0.15)
    assert heartbeat.trouble(may_stall=True) is Trouble.STALLED
    assert heartbeat.trouble(may_stall=False) is None
    heartbeat.turned(rests=False)
    assert heartbeat.trouble(may_stall=True) is None


def test_waiting_for_a_disk_that_never_answers_is_a_stall(heartbeat: Heartbeat) -> None:
    heartbeat.turned(rests=False)
    time.sleep(0.15)
    assert heartbeat.trouble(may_stall=True) is Trouble.STALLED


def test_slow_steps_are_given_more_time(heartbeat: Heartbeat) -> None:
    assert heartbeat.limit_s == 0.1
    heartbeat.woken()
    time.sleep(0.05)
    heartbeat.stepped()
    assert heartbeat.limit_s == pytest.approx(TIMES_P99 * 0.05, rel=0.5)
    time.sleep(0.15)
    assert heartbeat.trouble(may_stall=True) is None


def test_the_slowest_of_a_hundred_steps_do_not_count(heartbeat: Heartbeat) -> None:
    heartbeat.woken()
    time.sleep(0.05)
    heartbeat.stepped()
    for _ in range(1000):
        heartbeat.turned(rests=False)
        heartbeat.stepped()
    assert heartbeat.limit_s == 0.1


def test_dead_is_who_ended_untold(heartbeat: Heartbeat) -> None:
    heartbeat.ended(as_told=True)
    assert heartbeat.trouble(may_stall=True) is None
    heartbeat.ended(as_told=False)
    assert heartbeat.trouble(may_stall=False) is Trouble.DEAD
