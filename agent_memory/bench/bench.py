"""One run of the benchmark: what its parts are given, and what a part is.

Knows who takes part and how far the run has come.  Main thread.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.progress import Progress, TaskID

from agent_memory.bench.limits import Limits
from agent_memory.bench.measured import Notes
from agent_memory.bench.models import Model
from agent_memory.bench.servers import Contender, Ours
from agent_memory.bench.texts import Pages

Mode = Literal["quick", "normal", "full"]


@dataclass(frozen=True, slots=True)
class Part:
    """`measure` notes what it measures.  `seconds`: about how long that takes in each mode on two
    slow cores; 0: not there.  `anywhere`: also at a server that somebody else started.
    """

    name: str
    title: str
    measure: "Callable[[Bench], None]"
    seconds: Mapping[Mode, int]
    anywhere: bool = False


@dataclass(slots=True)
class Course:
    """How far a run has come, in expected seconds."""

    progress: Progress
    task: TaskID
    _title: str = ""
    _left: float = 0.0
    _each: float = 0.0

    def begin(self, title: str, seconds: float) -> None:
        self._title, self._left, self._each = title, seconds, seconds
        self.progress.update(self.task, description=title)

    def steps(self, count: int) -> None:
        """How many are to come; to be said before the first."""
        self._each = self._left / count

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        self.progress.update(self.task, description=f"{self._title}: {what}")
        yield
        self._advance(self._each)

    def end(self) -> None:
        self._advance(self._left)

    def _advance(self, seconds: float) -> None:
        seconds = min(seconds, self._left)
        self._left -= seconds
        self.progress.advance(self.task, seconds)


@dataclass(slots=True)
class Bench:
    """`contenders`: ours first; one alone if ours runs elsewhere, and then `ours` is None: it
    cannot be started again.  `folder`: for this run's files.
    """

    mode: Mode
    folder: Path
    models: Sequence[Model]
    ours: Ours | None
    contenders: Sequence[Contender]
    pages: Pages
    limits: Limits
    course: Course
    notes: Notes = field(default_factory=Notes)
