"""How far a run has come, and how long the rest will take."""

import io

from rich.console import Console
from rich.progress import Progress

from agent_memory.bench.progress import TimeLeft, progress, seconds_left, tell, words


def test_at_first_what_was_expected_counts_and_then_how_it_goes() -> None:
    assert seconds_left(600, 0, 0) == 600
    assert seconds_left(600, 300, 300) == 300
    assert 450 < seconds_left(600, 300, 600) < 600  # twice as slow
    assert 150 < seconds_left(600, 300, 150) < 200  # twice as fast
    assert seconds_left(600, 600, 700) == 0


def test_it_goes_down_within_a_step_too() -> None:
    now = [0.0]
    shown = Progress(get_time=lambda: now[0], disable=True)
    shown.add_task("", total=60)
    [task] = shown.tasks
    column, said = TimeLeft(), []
    for now[0], completed in ((0, 0), (9, 0), (20, 20), (25, 20), (100, 20)):
        shown.update(task.id, completed=completed)
        said.append(str(column.render(task)))
    assert said == ["60 s left", "51 s left", "40 s left", "35 s left", "0 s left"]


def test_it_is_told_roughly() -> None:
    assert [words(s) for s in (3.4, 89, 125, 600)] == ["3 s", "89 s", "2 min", "10 min"]


def test_where_nobody_looks_there_is_a_line_for_each_part() -> None:
    said = io.StringIO()
    console = Console(file=said)
    with progress(console) as shown:
        shown.add_task("", total=10)
        tell(console, "Switches", 45)
        tell(console, "Growth", 0)
    assert said.getvalue() == "Switches, about 45 s\nGrowth\n"
