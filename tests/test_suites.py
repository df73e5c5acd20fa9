"""A suite that was cut short does not pass."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.source import ROOT
from tests.suites import MAX_FAILURES, NewSuite


def test_all_of_the_plan_is_done(suite: NewSuite) -> None:
    with suite("whole", 3, 1) as cases:
        for n in range(3):
            with cases.case(n):
                pass
    assert cases.passed and (cases.done, cases.failures) == (3, 0)


def test_fewer_than_planned_is_a_failure(suite: NewSuite) -> None:
    with pytest.raises(AssertionError, match="cut short: 1 of 3 done"):
        with suite("cut short", 3, 1) as cases, cases.case(1):
            pass
    assert not cases.passed


def test_failures_are_counted_and_raised_at_the_end(suite: NewSuite) -> None:
    with pytest.raises(ExceptionGroup, match="bad: 2 failed") as raised:
        with suite("bad", 3, 7) as cases:
            for n in range(3):
                with cases.case(n):
                    assert n == 1
    assert (cases.done, cases.failures) == (3, 2)
    assert raised.value.exceptions[0].__notes__ == ["in case 0 of bad, seed 7"]


def test_a_hopeless_suite_is_given_up(suite: NewSuite) -> None:
    with pytest.raises(ExceptionGroup, match="hopeless: given up"):
        with suite("hopeless", 100, None) as cases:
            for n in range(100):
                with cases.case(n):
                    raise ValueError(n)
    assert cases.failures == MAX_FAILURES


SOME = """
import pytest

@pytest.mark.slow
def test_cut_short(suite):
    with suite("cut short", 3, 1) as cases, cases.case(1):
        pass

@pytest.mark.slow
@pytest.mark.suite("marked", planned=4)
@pytest.mark.parametrize("right", [True, False])
def test_marked(right):
    assert right
"""
MORE = """
import pytest

@pytest.mark.suite("marked", planned=4)
def test_marked():
    pytest.fail("as a test that takes too long does")

@pytest.mark.slow
def test_whole(suite):
    with suite("whole", 2, 1) as cases:
        for n in range(2):
            with cases.case(n):
                pass
"""


@pytest.mark.parametrize("num_processes", [0, 2])
def test_one_line_for_each_suite(tmp_path: Path, num_processes: int) -> None:
    """Whoever has run its cases; what was done before a suite failed is counted, too."""
    (tmp_path / "test_some.py").write_text(SOME)
    (tmp_path / "test_more.py").write_text(MORE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow\n    suite\n")
    flags = ["--suites", "suites.jsonl", "-p", "tests.suites", "-n", f"{num_processes}"]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "--dist", "loadfile", *flags],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == pytest.ExitCode.TESTS_FAILED, ran.stdout
    lines = [json.loads(line) for line in (tmp_path / "suites.jsonl").read_text().splitlines()]
    counted = {(line["suite"], line["planned"], line["done"], line["failures"]) for line in lines}
    assert len(lines) == 3
    assert counted == {("cut short", 3, 1, 0), ("marked", 4, 3, 2), ("whole", 2, 2, 0)}
    assert {line["commit"] for line in lines} != {"unknown"}
    assert ran.stdout.count("NOT PASSED") == 2
