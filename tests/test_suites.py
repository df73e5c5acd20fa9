"""A suite that was cut short does not pass."""

import pytest

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
