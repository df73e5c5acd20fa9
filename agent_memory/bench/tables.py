"""What was measured as tables of text: for each figure the ratio first, then whose it is.

Knows which server is ours and which are settings of `mlx_lm.server`; of the parts only how a switch
is told.  Plain values.  Main thread.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent_memory.bench.measured import At, Measured, of_json
from agent_memory.bench.servers import MLX_LM, OURS

ORDER = ("switch", "ttft", "concurrency", "pressure", "memory", "quality", "growth")
"""In which people read the parts; what is not here comes after."""
HEADLINE = "back at work"
SWITCH = (
    HEADLINE,
    "stop",
    "start",
    "load",
    "first token",
    "first token, median of agents",
    "tokens restored",
    "memory before",
    "memory after",
)
"""What is told of a switch first.  The ratio beside it is that of the headline."""
NOTHING = "–"


@dataclass(frozen=True, slots=True)
class Table:
    """`title`: what the figures are, in what unit, and what is better.

    `aligned`: of how many columns the text begins left; those after hold figures.  `overview`: a
    wide one, of what the tables of `detail` tell one by one.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    aligned: int
    detail: bool = False
    overview: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    name: str
    title: str
    tables: list[Table]


def of_part(results: Mapping[str, Any], part: str) -> list[Measured]:
    """Nothing if that part did not run."""
    return [of_json(one) for one in results.get(part, {}).get("measured", ())]


def parts(results: Mapping[str, Any]) -> list[str]:
    """Those that ran, as people read them."""
    ran = [k for k, found in results.items() if isinstance(found, dict) and "measured" in found]
    return sorted(ran, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


def sections(results: Mapping[str, Any]) -> list[Section]:
    return [
        Section(name, results[name]["title"], list(_tables(of_part(results, name))))
        for name in parts(results)
    ]


def _tables(measured: Sequence[Measured]) -> Iterator[Table]:
    switches = [one for one in measured if {"switch", "to"} <= one.at.keys()]
    if switches:
        yield switch_table(switches)
    groups: dict[tuple[object, ...], list[Measured]] = {}
    for one in measured:
        groups.setdefault((one.name, one.unit, one.more_is_better, *one.at), []).append(one)
    for group in sorted(groups.values(), key=lambda group: group[0].name != HEADLINE):
        yield table(group, detail=group[0] in switches)


def table(group: Sequence[Measured], *, detail: bool = False) -> Table:
    """Of one thing under several circumstances.  Columns in which nothing stands are left out, and
    what is the same for all is said once.
    """
    same = constant(group)
    keys = [key for key in group[0].at if key not in same]
    peers = list(dict.fromkeys(name for one in group for name in others(one)))
    columns = [*keys, f"{OURS} / {MLX_LM}", OURS, MLX_LM, *peers, "limit", f"{OURS} / limit"]
    rows = [[*(word(one.at[key]) for key in keys), *_figures(one, peers)] for one in group]
    used = [n for n in range(len(columns)) if n < len(keys) or any(r[n] != NOTHING for r in rows)]
    kept = [[row[n] for n in used] for row in rows]
    return Table(_title(group[0], same), [columns[n] for n in used], kept, len(keys), detail)


def constant(group: Sequence[Measured]) -> dict[str, str | int]:
    """The circumstances that are the same for all of them."""
    at = group[0].at
    return {key: at[key] for key in at if all(one.at.get(key) == at[key] for one in group)}


def in_words(at: At) -> str:
    return ", ".join(f"{key} {word(value)}" for key, value in at.items())


def _title(one: Measured, same: At) -> str:
    better = "more is better" if one.more_is_better else "less is better"
    under = f" ({in_words(same)})" if same else ""
    unit = f", {one.unit}" if one.unit else ""
    return f"{one.name[:1].upper()}{one.name[1:]}{under}{unit}; {better}"


def _figures(one: Measured, peers: Sequence[str]) -> list[str]:
    best = theirs(one)
    ours = span(one.values[OURS]) if one.values.get(OURS) else NOTHING
    setting = f" at {best.removeprefix(MLX_LM).strip()}" if best and best != MLX_LM else ""
    return [
        span(ratios(one)),
        ours,
        span(one.values[best]) + setting if best else NOTHING,
        *(span(one.values.get(name, ())) for name in peers),
        number(one.limit) if one.limit is not None else NOTHING,
        number(one.median(OURS) / one.limit) if one.limit and one.values.get(OURS) else NOTHING,
    ]


def theirs(one: Measured) -> str | None:
    """The setting of `mlx_lm.server` that is best at this."""
    return one.best([name for name in one.values if name.startswith(MLX_LM)])


def others(one: Measured) -> list[str]:
    return [name for name in one.values if name != OURS and not name.startswith(MLX_LM)]


def ratios(one: Measured, that: str | None = None) -> list[float]:
    """Ours to that one's, or to the best of theirs, round by round; none if these do not pair."""
    that = that or theirs(one)
    if that is None or len(one.values.get(OURS, ())) != len(one.values.get(that, ())):
        return []
    return one.ratios(OURS, that) if one.values.get(OURS) else []


def switch_table(switches: Sequence[Measured]) -> Table:
    """One row for each kind of switch and server, the headline first."""
    whole = [
        one for one in switches if one.name in SWITCH and one.at.keys() == switches[0].at.keys()
    ]
    by_place: dict[tuple[str, str], dict[str, Measured]] = {}
    for one in whole:
        place = str(one.at["switch"]), str(one.at["to"])
        by_place.setdefault(place, {})[one.name] = one
    units = {one.name: one.unit for one in whole}
    names = [name for name in SWITCH if name in units]
    rows = []
    for place, found in by_place.items():
        main = found.get(HEADLINE) or next(iter(found.values()))
        for server in _compared(main):
            medians = [_median(found.get(name), server) for name in names]
            ratio = span(ratios(main, server)) if server != OURS else NOTHING
            rows.append([*place, server, ratio, *medians])
    columns = ["switch", "to", "server", f"{OURS} / this"]
    columns += [f"{name}, {units[name]}" for name in names]
    same = in_words({key: at for key, at in constant(whole).items() if key not in ("switch", "to")})
    title = f"What a switch costs{f' ({same})' if same else ''}: medians"
    return Table(title, columns, rows, 3, overview=True)


def _compared(one: Measured) -> list[str]:
    """Ours, the best of theirs, and everybody else."""
    best = theirs(one)
    return [*([OURS] if OURS in one.values else []), *([best] if best else []), *others(one)]


def _median(one: Measured | None, server: str) -> str:
    return number(one.median(server)) if one and one.values.get(server) else NOTHING


def headlines(results: Mapping[str, Any]) -> list[str]:
    """The first thing to know, in whole sentences."""
    return [
        f"After a switch to {one.at['to']} ({one.at['switch']}) every agent of {OURS} is back at "
        f"work in {number(one.median(OURS))} {one.unit}, with {MLX_LM} in "
        f"{number(one.median(best))} {one.unit}."
        for one in of_part(results, "switch")
        if one.name == HEADLINE and OURS in one.values and (best := theirs(one))
    ]


def span(values: Sequence[float]) -> str:
    """The median, and in brackets the lowest and highest if these are not the same."""
    if not values:
        return NOTHING
    low, middle, high = (number(v) for v in (min(values), statistics.median(values), max(values)))
    return middle if low == high else f"{middle} ({low}–{high})"


def number(value: float) -> str:
    """Three digits of it, as people read numbers."""
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def word(value: str | int) -> str:
    return f"{value:,}" if isinstance(value, int) else value
