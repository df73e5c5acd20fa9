"""The command `bench`: takes the parts one after the other and leaves what they measured.

    results/latest.json   everything, value by value
    results/latest.md     the same as tables
    results/*.svg         the same as plots

Knows which parts there are.  Main thread.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from agent_memory import builtin
from agent_memory.bench import machine, models, switch, ttft
from agent_memory.bench.bench import Bench, Course, Mode, Part
from agent_memory.bench.limits import Limits
from agent_memory.bench.measured import Notes
from agent_memory.bench.models import Model
from agent_memory.bench.servers import CHUNKS, Contender, MlxLm, Ours, Running, peer
from agent_memory.bench.texts import Pages
from agent_memory.errors import ServerFailed, UsageError
from agent_memory.ops import backend, blas

FORMAT = 1
EXIT_INTERRUPTED = 130

PARTS: tuple[Part, ...] = (switch.PART, ttft.PART)


def main(args: argparse.Namespace) -> int:
    """Raises StartError."""
    if backend.find() == "cpu":
        blas.preload(os.environ)  # for every server alike
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the servers too
    parts = wanted(args.only, args.mode, anywhere=args.url is None)
    folder = Path(tempfile.mkdtemp(prefix="agent-memory-bench-")).resolve()
    console = Console(stderr=True, highlight=False)
    try:
        results = run(args, parts, folder, console)
    except ServerFailed as error:
        hint = f"Its logs are in {folder}." if args.keep else "With --keep the logs stay."
        raise ServerFailed(f"{error}\n{hint}") from error
    except KeyboardInterrupt:
        sys.stderr.write("agent-memory: interrupted; every server is stopped, nothing is kept\n")
        return EXIT_INTERRUPTED
    finally:
        if not args.keep:
            shutil.rmtree(folder)
    write(results, args.out)
    return 0


def wanted(only: str | None, mode: Mode, *, anywhere: bool) -> list[Part]:
    """Raises UsageError."""
    names = [part.name for part in PARTS]
    chosen = only.split(",") if only else [p.name for p in PARTS if p.seconds[mode]]
    if unknown := set(chosen) - set(names):
        raise UsageError(
            f"There is no part {', '.join(sorted(unknown))}. Parts: {', '.join(names)}."
        )
    return [part for part in PARTS if part.name in chosen and (anywhere or part.anywhere)]


def run(
    args: argparse.Namespace, parts: Sequence[Part], folder: Path, console: Console
) -> dict[str, Any]:
    began = time.monotonic()
    results: dict[str, Any] = {
        "format": FORMAT,
        "mode": args.mode,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(folder),
    }
    with _progress(console) as progress, Limits(folder) as limits:
        total = sum(part.seconds[args.mode] for part in parts)
        course = Course(progress, progress.add_task("", total=total))
        bench = prepare(args, folder, limits, course)
        results["models"] = [model.name for model in bench.models]
        results["servers"] = [contender.name for contender in bench.contenders]
        for part in parts:
            results[part.name] = measured(bench, part)
    results["seconds"] = round(time.monotonic() - began, 1)
    return results


def measured(bench: Bench, part: Part) -> dict[str, Any]:
    began = time.monotonic()
    bench.notes = Notes()
    bench.course.begin(part.title, part.seconds[bench.mode])
    part.measure(bench)
    bench.course.end()
    return {
        "title": part.title,
        "seconds": round(time.monotonic() - began, 1),
        "measured": [one.as_json() for one in bench.notes],
    }


def prepare(args: argparse.Namespace, folder: Path, limits: Limits, course: Course) -> Bench:
    """Raises UsageError."""
    course.begin("models", 0)
    on_cpu = backend.find() == "cpu"
    try:
        chosen = models.chosen(args.model or [], folder, float32=on_cpu)
    except ValueError as error:
        raise UsageError(f"--model cannot be used. Allowed: {error}.") from error
    if args.url is not None:
        running = Running(args.url.rstrip("/"), chosen[0].name)
        contenders: list[Contender] = [running]
        ours = None
    else:
        ours = Ours(folder, ("--kv-bits", args.kv_bits) if args.kv_bits else ())
        chunks = CHUNKS[:1] if args.mode == "quick" else CHUNKS
        contenders = [ours, *(MlxLm(folder, chunk) for chunk in chunks)]
        contenders += [peer(text, folder) for text in args.peer or []]
    pages = Pages(_tokenizer(chosen[0]))
    return Bench(args.mode, folder, chosen, ours, contenders, pages, limits, course)


def _tokenizer(model: Model) -> Path:
    """Its tokenizer.json; the built-in model's if it has none."""
    folder = Path(model.source)
    try:
        file = folder / "tokenizer.json" if folder.is_dir() else None
        return file or Path(hf_hub_download(model.source, "tokenizer.json"))
    except (OSError, ValueError):
        return builtin.PATH / "tokenizer.json"


def _progress(console: Console) -> Progress:
    columns = BarColumn(20), TimeRemainingColumn(), TextColumn("{task.description}")
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def write(results: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "latest.json").write_text(json.dumps(results, indent=1) + "\n")
