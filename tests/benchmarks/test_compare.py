"""Two runs beside one another, where what has changed is known."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from agent_memory.bench.measured import Notes
from benchmarks.compare import BETTER, SAME, UNKNOWN, WORSE, compare, machine_pace, main
from tests.bench import samples

ROUNDS = 3
NOISE = 0.05


def run(
    seed: int,
    ours: float = 1.0,
    pace: float = 1.0,
    *,
    rounds: int = ROUNDS,
    theirs: bool = True,
    figures: int = 20,
    unit: str = "ms",
    **changes: Any,
) -> dict[str, Any]:
    """`ours`, `pace`: how many times as much we and the whole machine take."""
    chance = random.Random(seed)

    def fill(notes: Notes) -> None:
        for n in range(figures):
            for _ in range(rounds):
                values = (100 * ours * pace, 150 * pace) if theirs else (100 * ours * pace,)
                noisy = tuple(v * chance.lognormvariate(0, NOISE) for v in values)
                samples.add(notes, f"figure {n}", {"tokens": 512}, unit, noisy)

    return samples.results({"ttft": fill}, **changes)


def verdicts(old: dict[str, Any], new: dict[str, Any]) -> set[str]:
    return {row.verdict for row in compare(old, new)}


def test_noise_alone_is_hardly_ever_a_change() -> None:
    rows = [row for seed in range(50) for row in compare(run(seed), run(seed + 1000))]
    assert len(rows) == 1000
    assert sum(row.verdict != SAME for row in rows) <= 10


@pytest.mark.parametrize(
    ("unit", "factor", "verdict"),
    [("ms", 2.0, WORSE), ("ms", 0.5, BETTER), ("tokens/s", 2.0, BETTER), ("tokens/s", 0.5, WORSE)],
)
def test_a_change_beyond_noise_is_found(unit: str, factor: float, verdict: str) -> None:
    assert verdicts(run(1, unit=unit), run(2, factor, unit=unit)) == {verdict}
    alone = run(1, unit=unit, theirs=False), run(2, factor, unit=unit, theirs=False)
    assert verdicts(*alone) == {verdict}


def test_a_machine_that_is_slower_today_is_not_a_change() -> None:
    old, new = run(1), run(2, pace=1.5)
    assert verdicts(old, new) == {SAME}
    pace = machine_pace(old, new)
    assert pace is not None and 1.4 < pace < 1.6
    assert all(row.ours is not None and row.ours > 1.3 for row in compare(old, new))


def test_of_another_machine_or_mode_only_ratios_are_judged() -> None:
    for changes in ({"mode": "full"}, {"machine": {**run(1)["machine"], "cores": 2}}):
        other: dict[str, Any] = changes
        assert verdicts(run(1, theirs=False), run(2, 1.5, theirs=False, **other)) == {UNKNOWN}
        assert verdicts(run(1), run(2, 2.0, **other)) == {WORSE}


def test_single_rounds_are_judged_by_the_noise_of_others_or_not_at_all() -> None:
    assert verdicts(run(1, rounds=1), run(2, 1.5, rounds=1)) == {UNKNOWN}
    assert verdicts(run(1, rounds=1), run(2, 2.0)) == {WORSE}


def test_what_only_one_run_has_is_left_out() -> None:
    assert len(compare(run(1, figures=3), run(2, figures=5))) == 3


def test_something_where_nothing_was_is_a_change() -> None:
    def refused(count: float) -> dict[str, Any]:
        def fill(notes: Notes) -> None:
            samples.add(notes, "requests refused", {}, "requests", (count,), (count,))

        return samples.results({"pressure": fill})

    assert verdicts(refused(0), refused(0)) == {SAME}
    assert verdicts(refused(0), refused(3)) == {WORSE}
    assert verdicts(refused(3), refused(0)) == {BETTER}


def test_a_stage_that_took_no_whole_millisecond_before_is_not_worse() -> None:
    def stage(seconds: float) -> dict[str, Any]:
        def fill(notes: Notes) -> None:
            for _ in range(2):
                samples.add(notes, "stage of the stop", {"stage": "drain"}, "s", (seconds,))

        return samples.results({"switch": fill})

    assert verdicts(stage(0), stage(0.001)) == {SAME}
    assert verdicts(stage(0), stage(0.05)) == {WORSE}


def test_the_exit_status_says_whether_something_is_worse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, same, slow = (tmp_path / name for name in ("old.json", "same.json", "slow.json"))
    old.write_text(json.dumps(run(1, figures=2)))
    same.write_text(json.dumps(run(2, figures=2)))
    slow.write_text(json.dumps(run(2, 2.0, figures=2, mode="full")))
    assert main([str(old), str(same)]) == 0
    said = capsys.readouterr().out
    assert "figure 0 (tokens 512), ms" in said and "2 within noise" in said
    assert main([str(old), str(slow), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["differences"] == ["mode: normal and full"]
    assert [row["verdict"] for row in told["rows"]] == [WORSE, WORSE]


def test_what_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "none.json"), str(tmp_path / "none.json")])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "none.json" in said and "make bench" in said
