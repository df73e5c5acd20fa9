"""Suites: many cases of one kind, whose number is planned and counted.

A suite that was cut short must not look like one that passed, so it fails unless as many cases were
run as planned.  With `--suites FILE` every slow suite leaves one JSON line there as soon as it has
ended, and a table ends the run.  A pytest plugin, loaded by tests/conftest.py.  Counts travel with
the reports of tests, so it makes no difference how many processes run them.

    @sized(short=10, full=500)
    def test_something(suite: NewSuite, num_cases: int) -> None:
        with suite("F1 killed while saving", num_cases, 1) as cases:
            for n in range(num_cases):
                with cases.case(n):
                    ...
"""

import json
import subprocess
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.source import ROOT

MAX_FAILURES = 5
"""After so many a suite is given up."""


@dataclass
class Cases:
    """The cases of one suite.  Count each with `case`."""

    suite: str
    planned: int
    seed: int | None
    done: int = 0
    failures: int = 0
    seconds: float = 0.0
    errors: list[BaseException] = field(default_factory=list)

    @contextmanager
    def case(self, name: object) -> Iterator[None]:
        """One case, done when this ends.  What it raises is kept, and raised at the end of all."""
        try:
            yield
        except Exception as error:
            error.add_note(f"in case {name!r} of {self.suite}, seed {self.seed}")
            self.errors.append(error)
            self.failures += 1
            if self.failures == MAX_FAILURES:
                raise ExceptionGroup(f"{self.suite}: given up", self._exceptions()) from None
        self.done += 1

    def finish(self) -> None:
        if self.errors:
            raise ExceptionGroup(f"{self.suite}: {self.failures} failed", self._exceptions())
        assert self.done == self.planned, f"{self.suite}: {self.done} of {self.planned} done"

    def counts(self) -> dict[str, Any]:
        counts = asdict(self)
        del counts["errors"]
        return counts

    def add(self, done: int, failures: int, seconds: float) -> None:
        self.done += done
        self.failures += failures
        self.seconds += seconds

    @property
    def passed(self) -> bool:
        return self.done == self.planned and not self.failures

    def _exceptions(self) -> list[Exception]:
        return [error for error in self.errors if isinstance(error, Exception)]


NewSuite = Callable[[str, int, int | None], AbstractContextManager[Cases]]


def sized(*, short: int, full: int, timeout_s: int = 1800) -> pytest.MarkDecorator:
    """A test of `num_cases`: a few in every run, all of them among the slow ones."""
    slow = [pytest.mark.slow, pytest.mark.timeout(timeout_s)]
    sizes = [pytest.param(short, id="short"), pytest.param(full, id="full", marks=slow)]
    return pytest.mark.parametrize("num_cases", sizes)


PROPERTY = "suite"
"""Of a test's report: the counts of a suite."""


@pytest.fixture
def suite(request: pytest.FixtureRequest) -> NewSuite:
    """Runs one suite; a slow test's is kept for the table."""
    kept = request.node.get_closest_marker("slow") is not None

    @contextmanager
    def run(name: str, planned: int, seed: int | None) -> Iterator[Cases]:
        cases = Cases(name, planned, seed)
        started = time.monotonic()
        try:
            yield cases
            cases.finish()
        finally:
            cases.seconds = time.monotonic() - started
            if kept:
                request.node.user_properties.append((PROPERTY, cases.counts()))

    return run


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test marked `suite(name, planned=, seed=)` is one case of that suite."""
    report = yield
    mark = item.get_closest_marker("suite")
    if mark is not None and report.when == "call":
        cases = Cases(*mark.args, **{"seed": None, **mark.kwargs})
        cases.add(1, report.failed, report.duration)
        report.user_properties.append((PROPERTY, cases.counts()))
    return report


class Table:
    """The suites of all tests that have ended so far, in `path` and at the end on the terminal.

    Where processes share the tests, the one that gives them out has it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._suites: dict[str, Cases] = {}
        self._commit = _commit()
        self._write()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call":
            return
        new = [counts for name, counts in report.user_properties if name == PROPERTY]
        for counts in new:
            self._add(counts)
        if new:
            self._write()

    def _add(self, counts: Any) -> None:
        name = counts["suite"]
        cases = self._suites.setdefault(name, Cases(name, counts["planned"], counts["seed"]))
        cases.add(counts["done"], counts["failures"], counts["seconds"])

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = (
            cases.counts() | {"seconds": round(cases.seconds, 1), "commit": self._commit}
            for cases in self._suites.values()
        )
        self._path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not all(cases.passed for cases in self._suites.values()) and session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self._suites:
            return
        terminalreporter.section("suites")
        terminalreporter.line(f"{'':44} {'planned':>8} {'done':>8} {'failures':>8} {'seconds':>8}")
        for cases in self._suites.values():
            numbers = f"{cases.planned:8,} {cases.done:8,} {cases.failures:8,} {cases.seconds:8.0f}"
            terminalreporter.line(
                f"{cases.suite:44} {numbers}{'' if cases.passed else '  NOT PASSED'}"
            )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--suites", type=Path, help="write one JSON line per slow suite to this file")


def pytest_configure(config: pytest.Config) -> None:
    path: Path | None = config.option.suites
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Table(path), "suites-table")


def _commit() -> str:
    try:
        asked = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.check_output(asked, cwd=ROOT, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
