"""What people and files are told of a run."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from agent_memory.bench import main, report, results, tables
from agent_memory.bench.bench import Mode
from agent_memory.bench.measured import Measured, of_json
from agent_memory.bench.servers import OURS
from agent_memory.bench.tables import number, span
from agent_memory.errors import UsageError
from tests.bench import samples

MODES: tuple[Mode, ...] = ("quick", "normal", "full")
MLX_LM = samples.THEIRS[0]


def figure(ours: list[float], theirs: list[float], other: list[float]) -> Measured:
    values = {OURS: ours, samples.THEIRS[0]: theirs, samples.THEIRS[1]: other}
    return Measured("first token", {"tokens": 2048}, "ms", values=values, limit=10.0)


def test_a_ratio_is_of_pairs_and_theirs_is_their_best_setting() -> None:
    one = figure([20, 40, 30], [100, 400, 100], [90, 90, 300])
    assert tables.theirs(one) == samples.THEIRS[1]
    assert tables.ratios(one) == [20 / 90, 40 / 90, 30 / 300]
    table = tables.table([one, Measured("first token", {"tokens": 512}, "ms")])
    assert table.title == "First token, ms; less is better"
    assert table.columns[:2] == ["tokens", "agent-memory / mlx_lm.server"]
    assert table.rows == [
        ["2,048", "0.222 (0.1–0.444)", "30 (20–40)", "90 (90–300) at 256", "10", "3"],
        ["512", "–", "–", "–", "–", "–"],
    ]


def test_where_rounds_do_not_pair_there_is_no_ratio() -> None:
    assert tables.ratios(figure([1, 2], [1], [1])) == []


def test_what_nobody_has_is_no_column_and_what_is_the_same_is_said_once() -> None:
    alone = [
        Measured("wait", {"agents": 4, "lap": lap}, "s", True, {OURS: [1.0]})
        for lap in ("first", "later")
    ]
    table = tables.table(alone)
    assert table.title == "Wait (agents 4), s; more is better"
    assert table.columns == ["lap", OURS]
    assert table.rows == [["first", "1"], ["later", "1"]]


def test_peers_have_columns_of_their_own() -> None:
    values = {OURS: [1.0], MLX_LM: [2.0], "other": [3.0]}
    table = tables.table([Measured("wait", {}, "s", values=values)])
    assert table.columns[1:] == [OURS, "mlx_lm.server", "other"]
    assert table.rows == [["0.5", "1", "2 at 2048", "3"]]


def test_a_switch_is_a_row_for_each_server() -> None:
    (switch, *_) = tables.sections(samples.results({"switch": samples.switch}))[0].tables
    assert switch.columns[:6] == ["switch", "to", "server", f"{OURS} / this"] + [
        "back at work, s",
        "stop, s",
    ]
    assert [row[:5] for row in switch.rows[:2]] == [
        ["restart", "builtin", OURS, "–", "2"],
        ["restart", "builtin", samples.THEIRS[1], "0.25 (0.225–0.275)", "8"],
    ]
    assert len(switch.rows) == 4


def test_people_read_the_switch_first_in_a_file_and_last_on_a_terminal() -> None:
    found = samples.results(samples.ALL)
    assert tables.parts(found) == ["switch", "ttft", "concurrency", "memory", "growth"]
    text = report.markdown(found, [Path("out/switch.svg")])
    assert text.index("## About switch") < text.index("## About ttft")
    assert "![About switch](switch.svg)" in text and "ttft.svg" not in text
    assert "back at work in 2 s, with mlx_lm.server in 8 s" in text
    assert "25.8 GB" in text and "Apple M4" in text and "mlx 0.32.4" in text
    shown = io.StringIO()
    report.show(Console(file=shown, width=100), found, [Path("out/latest.json")])
    said = shown.getvalue()
    assert said.index("About growth") < said.index("About switch")
    assert said.rstrip().endswith("out/latest.json")
    assert max(map(len, said.splitlines())) <= 100


def test_a_table_in_markdown_has_as_many_cells_in_each_row() -> None:
    lines = report.markdown(samples.results(samples.ALL), []).splitlines()
    for before, line in zip(lines, lines[1:], strict=False):
        if before.startswith("|") and line.startswith("|"):
            assert before.count("|") == line.count("|")


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0"), (0.0123, "0.0123"), (1, "1"), (99.94, "99.9"), (99.96, "100"), (1234.5, "1,234")],
)
def test_a_number_has_three_digits(value: float, said: str) -> None:
    assert number(value) == said


def test_several_rounds_are_told_with_their_spread() -> None:
    assert span([2.0, 1.0, 4.0]) == "2 (1–4)"
    assert span([2.0]) == span([2.0, 2.0]) == "2"
    assert span([]) == "–"


def test_the_run_before_stays_to_compare_with(tmp_path: Path) -> None:
    first = samples.results({"growth": samples.growth}, date="2026-01-01")
    second = samples.results({"growth": samples.growth}, date="2026-01-02")
    out = results.place(tmp_path / "made" / "here")
    for found in (first, second):
        files = results.write(found, out)
    assert set(files) <= set(out.iterdir())
    assert {file.name for file in out.iterdir()} == {
        *(file.name for file in files),
        "previous.json",
    }
    assert json.loads((out / "previous.json").read_text()) == first
    latest = json.loads((out / "latest.json").read_text())
    assert latest == second
    assert of_json(latest["growth"]["measured"][0]).median(OURS) == 2.1


def test_a_place_that_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--out"):
        results.place(tmp_path / "file" / "results")


def test_every_mode_measures_what_is_compared_and_shown_first() -> None:
    for mode in MODES:
        names = [part.name for part in main.wanted(None, mode, anywhere=True)]
        assert {"switch", "ttft", "concurrency", "memory"} <= set(names) <= set(tables.ORDER)
