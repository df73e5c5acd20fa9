"""How a run shows how far it has come: a line that moves, or one for each part where nobody looks.

Knows nothing of what runs.  Main thread.
"""

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

EXPECTED_WEIGHS_S = 30.0
"""For so long as this, what was expected counts more than how it has gone so far."""


class TimeLeft(ProgressColumn):
    """From the seconds that were expected, and how many those before have taken in truth."""

    max_refresh = 0.5

    def __init__(self) -> None:
        super().__init__()
        self._completed = 0.0
        self._elapsed = 0.0
        """When that was so."""

    def render(self, task: Task) -> Text:
        elapsed = task.elapsed or 0.0
        if task.completed != self._completed:
            self._completed, self._elapsed = task.completed, elapsed
        left = seconds_left(task.total or 0.0, self._completed, self._elapsed)
        return Text(f"{words(max(0.0, left - (elapsed - self._elapsed)))} left")


def seconds_left(total: float, completed: float, elapsed: float) -> float:
    """At the end of a step.  `total`, `completed`: in expected seconds."""
    pace = (elapsed + EXPECTED_WEIGHS_S) / (completed + EXPECTED_WEIGHS_S)
    return max(0.0, total - completed) * pace


def words(seconds: float) -> str:
    """Roughly, as nobody knows better."""
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def progress(console: Console) -> Progress:
    columns = BarColumn(20), TimeLeft(), TextColumn("{task.description}")
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def tell(console: Console, title: str, seconds: float) -> None:
    """That a part begins."""
    if not console.is_terminal:
        about = f", about {words(seconds)}" if seconds else ""
        console.print(f"{title}{about}", markup=False, soft_wrap=True)
