"""The results as plots: one SVG for each part that has something to show.

The same results give the same bytes.  Black on white, in colours that everybody can tell apart.
Knows what the parts call their figures.  Imported only where matplotlib is.  Main thread.
"""

import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from agent_memory.bench import tables
from agent_memory.bench.measured import Measured
from agent_memory.bench.servers import MLX_LM, OURS
from agent_memory.bench.tables import HEADLINE, number, theirs

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "agent-memory",
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "text.color": "black",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 10,
    "legend.frameon": False,
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#882255", "#777777")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "//", "..", "xx", "--", "++")
LIMIT = "limit of this machine"
FORMAT = FuncFormatter(lambda value, _: number(value))
BESIDE: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1, 1), "fontsize": 8}
PER_TOKEN = " per token"
CLOSE = 1.3
"""What is above a point by less than this factor would hide its label."""

Line = tuple[str, list[tuple[float, float]]]
"""What it is, and its points."""


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """One file for each part that ran and can be drawn, named after it."""
    drawn = []
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever is set on this machine
        matplotlib.rcParams.update(STYLE)
        for part, plot in PLOTS.items():
            figure = plot(tables.of_part(results, part))
            if figure is not None:
                file = folder / f"{part}.svg"
                _save(figure, file)
                drawn.append(file)
    return drawn


def _save(figure: Figure, file: Path) -> None:
    svg = io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    unfinished = file.with_name(f"{file.name}.unfinished")
    unfinished.write_bytes(svg.getvalue())
    os.replace(unfinished, file)


def switch(measured: Sequence[Measured]) -> Figure | None:
    """Seconds until everybody is back at work."""
    shown = [one for one in measured if one.name == HEADLINE]
    return _bars(
        [(f"{one.at.get('switch')}\nto {one.at.get('to')}", one) for one in shown],
        f"After a model switch: {HEADLINE}, lower is better",
    )


def memory(measured: Sequence[Measured]) -> Figure | None:
    """Of the first model; how many bytes were ever written is another matter."""
    tokens = [m for m in measured if PER_TOKEN in m.name and not m.name.startswith("written")]
    model = tokens[0].at.get("model") if tokens else None
    shown = [one for one in tokens if one.at.get("model") == model]
    kinds = [f"{m.name.replace(PER_TOKEN, '')}\nkv_bits {m.at.get('kv_bits')}" for m in shown]
    title = f"Memory for each token{f' of {model}' if model else ''}, lower is better"
    return _bars(list(zip(kinds, shown, strict=True)), title)


def _bars(groups: Sequence[tuple[str, Measured]], title: str) -> Figure | None:
    """A group of bars for each; of their settings the best."""
    if not groups:
        return None
    names = [OURS, MLX_LM, *dict.fromkeys(name for _, m in groups for name in tables.others(m))]
    figure, axes = _axes(title, width=max(7.0, 0.55 * len(groups) * len(names)))
    width = 0.8 / len(names)
    for k, name in enumerate(names):
        at = [(n, value) for n, (_, m) in enumerate(groups) if (value := _median(m, name))]
        places = [n + (k - (len(names) - 1) / 2) * width for n, _ in at]
        heights = [value for _, value in at]
        look = _look(k)
        bars = axes.bar(places, heights, 0.92 * width, color=look["color"], label=name)
        for bar in bars:
            bar.set(hatch=HATCHES[k % len(HATCHES)], edgecolor="white", linewidth=0)
        axes.bar_label(bars, [number(value) for value in heights], padding=2, fontsize=8)
    limits = [(n, m.limit) for n, (_, m) in enumerate(groups) if m.limit]
    if limits:
        left, right = [n - 0.45 for n, _ in limits], [n + 0.45 for n, _ in limits]
        heights = [limit for _, limit in limits]
        axes.hlines(heights, left, right, "black", "dashed", linewidth=1, label=LIMIT)
    axes.set_xticks(range(len(groups)), [text for text, _ in groups], fontsize=8)
    axes.set_ylabel(groups[0][1].unit)
    axes.margins(y=0.15)
    axes.yaxis.set_major_formatter(FORMAT)
    axes.legend(**BESIDE)
    return figure


def ttft(measured: Sequence[Measured]) -> Figure | None:
    """Milliseconds over tokens: everything cold, and ours restored."""
    keys = {"state", "prompt", "tokens"}
    timed = [m for m in measured if keys <= m.at.keys() and m.unit == "ms"]
    cold = [m for m in timed if m.at.get("prompt") == "cold"]
    again = [m for m in timed if m.at.get("prompt") == "identical"]
    names = [OURS, MLX_LM, *dict.fromkeys(name for m in cold for name in tables.others(m))]
    lines = [(f"{name}, cold", _over("tokens", cold, name)) for name in names]
    for state in dict.fromkeys(str(m.at["state"]) for m in again):
        these = [m for m in again if m.at["state"] == state]
        lines.append((f"{OURS}, {state}", _over("tokens", these, OURS)))
    limits = [("limit, cold", _limits("tokens", cold))]
    return _lines(lines, limits, "First token, lower is better", "tokens of the prompt", timed)


def concurrency(measured: Sequence[Measured]) -> Figure | None:
    """Tokens per second over equal streams."""
    rates = [m for m in measured if m.more_is_better and "/s" in m.unit and "streams" in m.at]
    equal = [m for m in rates if m.at.get("arrival") == "equal"]
    names = [OURS, MLX_LM, *dict.fromkeys(name for m in equal for name in tables.others(m))]
    lines = [(name, _over("streams", equal, name)) for name in names]
    limits = [(LIMIT, _limits("streams", equal))]
    title = "Tokens per second of all streams together, higher is better"
    return _lines(lines, limits, title, "streams at once", equal)


def growth(measured: Sequence[Measured]) -> Figure | None:
    """Milliseconds over whatever grows, each thing a line."""
    timed = [m for m in measured if m.unit == "ms" and _grows(m)]
    kinds: dict[str, list[tuple[float, float]]] = {}
    for one in timed:
        key = _grows(one)
        where = "".join(f", {value}" for value in one.at.values() if isinstance(value, str))
        kinds.setdefault(f"{one.name}{where}, by {key}", []).extend(_over(key, [one], OURS))
    lines = [(name, sorted(points)) for name, points in kinds.items()]
    return _lines(lines, [], "How costs grow, lower is better", "how many", timed)


def _grows(one: Measured) -> str:
    return next((key for key, value in one.at.items() if isinstance(value, int)), "")


def _lines(
    lines: Sequence[Line],
    limits: Sequence[Line],
    title: str,
    along: str,
    measured: Sequence[Measured],
) -> Figure | None:
    """On logarithmic scales, so that what is many times faster can still be read."""
    lines = [(name, points) for name, points in lines if points]
    if not lines:
        return None
    figure, axes = _axes(title, width=8.0)
    for n, (name, points) in enumerate(lines):
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, marker=MARKERS[n % len(MARKERS)], label=name, **_look(n))
        for x, y in points:
            hidden = any(at == x and y < other < CLOSE * y for _, ps in lines for at, other in ps)
            _label(axes, x, y, below=hidden)
    for name, points in limits:
        if points:
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, color="black", linestyle="dashed", linewidth=1, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    counts = sorted({x for _, points in lines for x, _ in points})
    axes.set_xticks(counts, [f"{count:,.0f}" for count in counts])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FORMAT)
    axes.set_xlabel(along)
    axes.set_ylabel(measured[0].unit)
    axes.margins(0.08, 0.12)
    axes.legend(**BESIDE)
    return figure


def _axes(title: str, width: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left")
    axes.grid(axis="y", color="#dddddd")
    axes.set_axisbelow(True)
    return figure, axes


def _label(axes: Axes, x: float, y: float, *, below: bool) -> None:
    place: dict[str, Any] = {"xytext": (0, -12 if below else 6), "textcoords": "offset points"}
    axes.annotate(number(y), (x, y), fontsize=7, ha="center", **place)


def _look(n: int) -> dict[str, Any]:
    return {"color": COLOURS[n % len(COLOURS)]}


def _median(one: Measured, name: str) -> float | None:
    """`mlx_lm.server`: at its best setting."""
    server = theirs(one) if name == MLX_LM else name
    return one.median(server) if server and one.values.get(server) else None


def _over(key: str, these: Iterable[Measured], name: str) -> list[tuple[float, float]]:
    points = [(float(m.at[key]), value) for m in these if (value := _median(m, name))]
    return sorted(points)


def _limits(key: str, these: Iterable[Measured]) -> list[tuple[float, float]]:
    return sorted((float(m.at[key]), m.limit) for m in these if m.limit)


PLOTS: dict[str, Callable[[Sequence[Measured]], Figure | None]] = {
    "switch": switch,
    "ttft": ttft,
    "concurrency": concurrency,
    "memory": memory,
    "growth": growth,
}
