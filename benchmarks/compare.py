"""Two runs of the benchmark beside one another: what has changed by more than noise.

    python -m benchmarks.compare [OLD.json NEW.json] [--json]

Without names: the last run that `make bench` left, and the one before.  Where `mlx_lm.server` took
part in both, what counts is ours / theirs, round by round, because that does not depend on how fast
the machine was that day; else our own figures.  Of other machines or modes nothing but these ratios
can be compared.  Exit status 1 if something is worse.

Noise is how far the rounds of one run lie apart, as a standard deviation of logarithms: the larger
of a figure's own and what is usual for figures in that unit, because three rounds that happen to
agree prove little.  A change counts if it is larger than 5 % and than 3 standard errors of a
difference of medians.  By chance that is so for about one figure in 400.  With a single round on
both sides and nothing else to tell the noise by, nothing is judged.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from agent_memory.bench import tables
from agent_memory.bench.measured import Measured
from agent_memory.bench.servers import MLX_LM, OURS

FOLDER = Path("benchmarks/results")
SMALLEST = math.log(1.05)
STANDARD_ERRORS = 3.0
OF_A_MEDIAN = math.sqrt(math.pi / 2)
"""Its standard error, in those of a mean."""
LEAST_S = 0.002
"""Stages are told in whole milliseconds."""
WORSE, BETTER, SAME, UNKNOWN = "worse", "better", "within noise", "not judged"

Run = Mapping[str, Any]


@dataclass(frozen=True)
class Series:
    """One figure in both runs, round by round.  `ratio`: ours / theirs."""

    what: str
    unit: str
    more_is_better: bool
    old: Sequence[float]
    new: Sequence[float]
    ratio: bool

    @property
    def change(self) -> float | None:
        """Of the median, as a factor."""
        before, after = statistics.median(self.old), statistics.median(self.new)
        return after / before if before > 0 and after > 0 else 1.0 if before == after else None

    @property
    def noise(self) -> float | None:
        """Of one round, in logarithms."""
        sides = [[math.log(v) for v in side] for side in (self.old, self.new) if min(side) > 0]
        freedom = sum(len(side) - 1 for side in sides)
        if not freedom:
            return None
        squares = sum((v - statistics.mean(side)) ** 2 for side in sides for v in side)
        return math.sqrt(squares / freedom)


@dataclass(frozen=True)
class Row:
    """`ours`, `ratio`: change of the medians.  `least`: the smallest change that would count."""

    what: str
    unit: str
    ours: float | None
    ratio: float | None
    least: float | None
    verdict: str


def compare(old: Run, new: Run) -> list[Row]:
    """Of everything that is in both."""
    found = [
        (one, other)
        for part in tables.parts(new)
        for one, other in _pairs(tables.of_part(old, part), tables.of_part(new, part))
    ]
    ours = [_series(a, b, ratio=False) for a, b in found]
    ratios = [_series(a, b, ratio=True) for a, b in found]
    judged = [ratio or own for own, ratio in zip(ours, ratios, strict=True)]
    usual = _usual_noise([series for series in judged if series])
    return [
        Row(
            series.what,
            series.unit,
            own.change if own else None,
            ratio.change if ratio else None,
            least := _least(series, usual),
            _verdict(series, least) if ratio or comparable(old, new) else UNKNOWN,
        )
        for own, ratio, series in zip(ours, ratios, judged, strict=True)
        if series
    ]


def comparable(old: Run, new: Run) -> bool:
    """Also what is not a ratio."""
    return not differences(old, new)


def differences(old: Run, new: Run) -> list[str]:
    """Why our figures of the one say nothing about the other's."""
    said = [
        (name, old["machine"][name], new["machine"][name])
        for name in ("chip", "cores", "memory_bytes", "backend", "blas")
    ]
    said += [(name, old.get(name), new.get(name)) for name in ("mode", "models", "kv_bits")]
    return [f"{name}: {before} and {after}" for name, before, after in said if before != after]


def updated(old: Run, new: Run) -> list[str]:
    """What a change may come from."""
    before, after = ({**run["machine"]["versions"], **_own(run)} for run in (old, new))
    return [f"{k} {before.get(k)} to {after[k]}" for k in after if after[k] != before.get(k)]


def _own(run: Run) -> dict[str, Any]:
    machine = run["machine"]
    return {"Python": machine["python"], "system": machine["system"], "commit": machine["commit"]}


def _pairs(old: Sequence[Measured], new: Sequence[Measured]) -> list[tuple[Measured, Measured]]:
    before = {(one.name, *sorted(one.at.items())): one for one in old}
    keys = [(one, (one.name, *sorted(one.at.items()))) for one in new]
    return [(before[key], one) for one, key in keys if key in before]


def _series(old: Measured, new: Measured, *, ratio: bool) -> Series | None:
    """None if there is no such figure in both.  Theirs is the setting that was best before."""
    at = ", ".join(f"{name} {value}" for name, value in new.at.items())
    what = f"{new.name} ({at})" if at else new.name
    if not ratio:
        values = old.values.get(OURS, []), new.values.get(OURS, [])
    else:
        best = tables.theirs(old)
        if best is None or best not in new.values:
            return None
        values = tables.ratios(old, best), tables.ratios(new, best)
    if not all(values):
        return None
    return Series(what, new.unit, new.more_is_better, *values, ratio)


def _usual_noise(all_of_them: Sequence[Series]) -> dict[tuple[str, bool], float]:
    """By unit, and whether it is a ratio."""
    found: dict[tuple[str, bool], list[float]] = {}
    for series in all_of_them:
        if series.noise is not None:
            found.setdefault((series.unit, series.ratio), []).append(series.noise)
    return {kind: statistics.median(noises) for kind, noises in found.items()}


def _least(series: Series, usual: Mapping[tuple[str, bool], float]) -> float | None:
    """A factor above 1."""
    known = [series.noise, usual.get((series.unit, series.ratio))]
    noises = [noise for noise in known if noise is not None]
    if not noises:
        return None
    rounds = math.sqrt(1 / len(series.old) + 1 / len(series.new))
    return math.exp(max(SMALLEST, STANDARD_ERRORS * OF_A_MEDIAN * max(noises) * rounds))


def _verdict(series: Series, least: float | None) -> str:
    change, grown = series.change, statistics.median(series.new) - statistics.median(series.old)
    if series.unit == "s" and not series.ratio and abs(grown) <= LEAST_S:
        return SAME
    if change is None:  # from nothing to something, or back
        return BETTER if (grown > 0) == series.more_is_better else WORSE
    if least is None:
        return SAME if change == 1 else UNKNOWN
    if max(change, 1 / change) <= least:
        return SAME
    return BETTER if (change > 1) == series.more_is_better else WORSE


def machine_pace(old: Run, new: Run) -> float | None:
    """How many times as long `mlx_lm.server`, which is not ours to change, takes now."""
    changes = []
    for part in tables.parts(new):
        for a, b in _pairs(tables.of_part(old, part), tables.of_part(new, part)):
            best = tables.theirs(a)
            if a.unit in ("s", "ms") and best in b.values and best is not None and a.median(best):
                changes.append(b.median(best) / a.median(best))
    return statistics.median(changes) if changes else None


def show(old: Run, new: Run, rows: Sequence[Row]) -> None:
    console = Console(highlight=False)
    for said in differences(old, new):
        console.print(f"Not the same: {said}", style="bold", markup=False)
    if not comparable(old, new):
        console.print(f"So only {OURS} / {MLX_LM} is judged.", style="bold")
    if updates := updated(old, new):
        console.print(f"Updated meanwhile: {', '.join(updates)}.", markup=False)
    if pace := machine_pace(old, new):
        console.print(f"{MLX_LM} itself takes {pace:.2f} times as long as before (median).")
    console.print(f"How the medians have changed; ours: {OURS}, theirs: {MLX_LM}.")
    table = Table("figure", "ours", "ours/theirs", "counts from", "", box=None)
    for row in rows:
        cells = [_percent(row.ours), _percent(row.ratio), _percent(row.least)]
        style = {WORSE: "red", BETTER: "green"}.get(row.verdict, "")
        cells = [f"{row.what}, {row.unit}" if row.unit else row.what, *cells, row.verdict]
        table.add_row(*map(Text, cells), style=style)
    console.print(table)
    counts = {v: sum(row.verdict == v for row in rows) for v in (WORSE, BETTER, SAME, UNKNOWN)}
    console.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))


def _percent(factor: float | None) -> str:
    if factor is None:
        return "–"
    return f"{100 * (factor - 1):+.0f} %" if factor < 3 else f"× {factor:.3g}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What has changed from one run to another.")
    parser.add_argument("old", type=Path, nargs="?", default=FOLDER / "previous.json")
    parser.add_argument("new", type=Path, nargs="?", default=FOLDER / "latest.json")
    parser.add_argument("--json", action="store_true", help="Print JSON instead.")
    args = parser.parse_args(argv)
    try:
        old, new = (json.loads(file.read_text("utf-8")) for file in (args.old, args.new))
    except (OSError, ValueError) as error:
        parser.error(f"cannot be read: {error}. Run 'make bench' twice, or name two results.")
    rows = compare(old, new)
    if args.json:
        told = {"differences": differences(old, new), "mlx_lm_takes": machine_pace(old, new)}
        sys.stdout.write(json.dumps({**told, "rows": [asdict(r) for r in rows]}, indent=1) + "\n")
    else:
        show(old, new, rows)
    return 1 if any(row.verdict == WORSE for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
