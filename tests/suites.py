"""Suites: many cases of one kind, whose number is planned and counted.

A suite that was cut short must not look like one that passed, so it fails unless as many cases were
run as planned.  With `--suites FILE` every slow suite leaves one JSON line there, and a table ends
the run.  A pytest plugin, loaded by tests/conftest.py.

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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

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
    commit: str = ""
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

    def line(self) -> str:
        facts = asdict(self)
        del facts["errors"]
        return json.dumps(facts | {"seconds": round(self.seconds, 1)})

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


@pytest.fixture
def suite(request: pytest.FixtureRequest) -> NewSuite:
    """Runs one suite; a slow test's is kept for the table."""
    kept = request.node.get_closest_marker("slow") is not None

    @contextmanager
    def run(name: str, planned: int, seed: int | None) -> Iterator[Cases]:
        cases = Cases(name, planned, seed)
        if kept:
            request.config.stash[_SUITES].append(cases)
        started = time.monotonic()
        try:
            yield cases
            cases.finish()
        finally:
            cases.seconds = time.monotonic() - started

    return run


_SUITES = pytest.StashKey[list[Cases]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--suites", type=Path, help="write one JSON line per slow suite to this file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SUITES] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A test marked `suite(name, planned=, seed=)` is one case of that suite."""
    mark = item.get_closest_marker("suite")
    if mark is None:
        return (yield)
    cases = _marked(item.config.stash[_SUITES], *mark.args, **mark.kwargs)
    started = time.monotonic()
    try:
        return (yield)
    except Exception:
        cases.failures += 1
        raise
    finally:
        cases.done += 1
        cases.seconds += time.monotonic() - started


def _marked(suites: list[Cases], name: str, *, planned: int, seed: int | None = None) -> Cases:
    found = next((cases for cases in suites if cases.suite == name), None)
    if found is None:
        found = Cases(name, planned, seed)
        suites.append(found)
    return found


def pytest_sessionfinish(session: pytest.Session) -> None:
    path, suites = session.config.option.suites, session.config.stash[_SUITES]
    if path is None:
        return
    commit = _commit()
    for cases in suites:
        cases.commit = commit
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{cases.line()}\n" for cases in suites))
    if not all(cases.passed for cases in suites) and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if config.option.suites is None or not config.stash[_SUITES]:
        return
    terminalreporter.section("suites")
    terminalreporter.line(f"{'':44} {'planned':>8} {'done':>8} {'failures':>8} {'seconds':>8}")
    for cases in config.stash[_SUITES]:
        numbers = f"{cases.planned:8,} {cases.done:8,} {cases.failures:8,} {cases.seconds:8.0f}"
        terminalreporter.line(f"{cases.suite:44} {numbers}{'' if cases.passed else '  NOT PASSED'}")


def _commit() -> str:
    try:
        asked = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.check_output(asked, cwd=ROOT, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
