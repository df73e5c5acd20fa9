"""The results for people: as a Markdown file, and the same on the terminal.

Knows what a results file holds; what the figures say is in `tables`.  Main thread.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box, filesize
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from agent_memory.bench.servers import MLX_LM, OURS
from agent_memory.bench.tables import Section, Table, headlines, sections

TITLE = f"{OURS} beside {MLX_LM}"
WIDE = 130
"""Characters that a terminal needs to show an overview."""
HOW_TO_READ = (
    "A figure is the median of the rounds, with the lowest and the highest in brackets where they "
    f"differ. {OURS} / {MLX_LM} is computed round by round, because both were measured right "
    "after one another, and is the median of these ratios: below 1 we need less, above 1 we need "
    f"or do more. {MLX_LM} is whichever of its settings is best at that very row; the number after "
    "*at* is its prefill step size in tokens. The limit is what the work itself takes on this "
    "machine, measured with bare mlx-lm and plain file reading, without any server. – means: not "
    "measured there, or there is no such thing."
)


def facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """On what it ran.  A figure means nothing without it."""
    machine = results["machine"]
    memory = machine["memory_bytes"]
    kinds = [machine["backend"], machine["blas"]]
    hardware = [machine["chip"], f"{machine['cores']} cores"]
    hardware += [f"{filesize.decimal(memory)} of memory"] if memory else []
    hardware += [f"disk: {machine['disk']}"] if machine["disk"] else []
    versions = {"Python": machine["python"], **machine["versions"]}
    found = [
        ("date", str(results["date"])),
        ("mode", f"{results['mode']}, {results['seconds']:.0f} seconds"),
        ("machine", ", ".join(map(str, hardware))),
        ("system", str(machine["system"])),
        ("computing", " with ".join(str(kind) for kind in kinds if kind)),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("commit", str(machine["commit"] or "not of a checkout")),
        ("models", ", ".join(results["models"])),
        ("servers", ", ".join(results["servers"])),
    ]
    if "kv_bits" in results:
        bits = f"{results['kv_bits']}, of {OURS} where a table says nothing else"
        found.append(("kv_bits", bits))
    if "url" in results:
        found.append(("asked at", f"{results['url']}; the machine above is the one that asks"))
    return found


def markdown(results: Mapping[str, Any], plots: Sequence[Path]) -> str:
    """`plots`: beside the file this is for, each named after its part."""
    lines = [f"# {TITLE}", ""]
    lines += [line for said in headlines(results) for line in (f"**{said}**", "")]
    lines += [
        "| | |",
        "|---|---|",
        *(f"| {name} | {_cell(said)} |" for name, said in facts(results)),
    ]
    lines += ["", HOW_TO_READ]
    for section in sections(results):
        lines += ["", f"## {section.title}"]
        drawn = [plot.name for plot in plots if plot.stem == section.name]
        lines += [line for name in drawn for line in ("", f"![{section.title}]({name})")]
        for table in section.tables:
            lines += ["", f"### {table.title}", "", *_markdown_table(table)]
    return "\n".join(lines) + "\n"


def _markdown_table(table: Table) -> list[str]:
    rule = ["---" if n < table.aligned else "---:" for n in range(len(table.columns))]
    rows = [table.columns, rule, *table.rows]
    return [f"| {' | '.join(map(_cell, row))} |" for row in rows]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def show(console: Console, results: Mapping[str, Any], files: Sequence[Path]) -> None:
    """What people look for first comes last, where the eye is."""
    last_first = sections(results)[::-1]
    for section in last_first:
        _show_section(console, section)
    for said in headlines(results):
        console.print(said, style="bold", markup=False)
    for file in files:
        console.print(str(file), markup=False, soft_wrap=True)


def _show_section(console: Console, section: Section) -> None:
    console.print()
    console.rule(Text(section.title), align="left")
    wide = console.width >= WIDE
    for table in section.tables[::-1]:
        if not (table.detail if wide else table.overview):
            _show_table(console, table)


def _show_table(console: Console, table: Table) -> None:
    console.print(table.title, style="italic", markup=False)
    shown = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for n, name in enumerate(table.columns):
        if n < table.aligned:
            shown.add_column(Text(name), overflow="fold")
        else:
            shown.add_column(Text(name), justify="right", overflow="fold")
    for row in table.rows:
        shown.add_row(*map(Text, row))
    console.print(shown)
