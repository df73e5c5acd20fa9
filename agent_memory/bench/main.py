"""The command `bench`: takes the parts one after the other and leaves what they measured.

Knows which parts there are.  Main thread.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from huggingface_hub import hf_hub_download
from rich.console import Console

from agent_memory import builtin, config
from agent_memory.bench import (
    concurrency,
    elsewhere,
    footprint,
    growth,
    machine,
    models,
    pressure,
    quality,
    report,
    results,
    switch,
    ttft,
)
from agent_memory.bench.bench import Bench, Course, Mode, Part
from agent_memory.bench.limits import Limits
from agent_memory.bench.measured import Notes
from agent_memory.bench.models import Model
from agent_memory.bench.progress import progress, tell
from agent_memory.bench.servers import CHUNKS, Contender, MlxLm, Ours, peer
from agent_memory.bench.texts import Pages
from agent_memory.errors import ServerFailed, UsageError
from agent_memory.ops import backend, blas
from agent_memory.ops.terminal import output_console

FORMAT = 1
EXIT_INTERRUPTED = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

PARTS: tuple[Part, ...] = (
    switch.PART,
    ttft.PART,
    concurrency.PART,
    pressure.PART,
    footprint.PART,
    quality.PART,
    growth.PART,
)


def main(args: argparse.Namespace) -> int:
    """Raises StartError."""
    parts = wanted(args.only, args.mode, anywhere=args.url is None)
    if args.url is not None and (args.peer or args.kv_bits):
        raise UsageError("--url asks a server as it is: leave out --peer and --kv-bits.")
    if backend.find() == "cpu":
        blas.preload(os.environ)  # for every server alike
    out = results.place(args.out)
    console = Console(stderr=True, highlight=False)
    if not results.can_draw():
        console.print(results.NO_PLOTS, markup=False, soft_wrap=True)
    try:
        with once_interrupted(), working_folder(keep=args.keep) as folder:
            found = run(args, parts, folder, console)
    except KeyboardInterrupt:
        kept = "" if args.keep else ", nothing is kept"
        sys.stderr.write(f"agent-memory: interrupted; every server is stopped{kept}\n")
        return EXIT_INTERRUPTED
    files = results.write(found, out)
    if args.json:
        sys.stdout.write(results.as_json(found))
    else:
        report.show(output_console(), found, files)
    return 0


@contextmanager
def once_interrupted() -> Iterator[None]:
    """Signals end what runs, servers too; another one does not keep them from being ended."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextmanager
def working_folder(*, keep: bool) -> Iterator[Path]:
    """For the servers' files and logs."""
    folder = Path(tempfile.mkdtemp(prefix="agent-memory-bench-")).resolve()
    try:
        yield folder
    except ServerFailed as error:
        hint = f"Its logs are in {folder}." if keep else "With --keep the logs stay."
        raise ServerFailed(f"{error}\n{hint}") from error
    finally:
        if not keep:
            shutil.rmtree(folder)


def wanted(only: str | None, mode: Mode, *, anywhere: bool) -> list[Part]:
    """Raises UsageError."""
    names = [part.name for part in PARTS]
    chosen = only.split(",") if only else [p.name for p in PARTS if p.seconds[mode]]
    if unknown := set(chosen) - set(names):
        raise UsageError(
            f"There is no part {', '.join(sorted(unknown))}. Parts: {', '.join(names)}."
        )
    parts = [part for part in PARTS if part.name in chosen and (anywhere or part.anywhere)]
    if not parts:
        able = ", ".join(part.name for part in PARTS if part.anywhere)
        raise UsageError(f"None of these can be measured at --url. What can: {able}.")
    return parts


def run(
    args: argparse.Namespace, parts: Sequence[Part], folder: Path, console: Console
) -> dict[str, Any]:
    began = time.monotonic()
    found: dict[str, Any] = {
        "format": FORMAT,
        "mode": args.mode,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(folder),
    }
    if args.url is not None:
        found["url"] = args.url
    else:
        found["kv_bits"] = args.kv_bits or _kv_bits_configured()
    with progress(console) as shown, Limits(folder) as limits:
        total = sum(part.seconds[args.mode] for part in parts)
        bench = prepare(args, folder, limits, Course(shown, shown.add_task("", total=total)))
        found["models"] = [model.name for model in bench.models]
        found["servers"] = [contender.name for contender in bench.contenders]
        for part in parts:
            tell(console, part.title, part.seconds[args.mode])
            found[part.name] = measured(bench, part)
    found["seconds"] = round(time.monotonic() - began, 1)
    return found


def measured(bench: Bench, part: Part) -> dict[str, Any]:
    """Raises ServerFailed."""
    began = time.monotonic()
    bench.notes = Notes()
    bench.course.begin(part.title, part.seconds[bench.mode])
    try:
        part.measure(bench)
    except (httpx.HTTPError, RuntimeError) as error:
        raise ServerFailed(f"{part.title}: {error}") from error
    bench.course.end()
    return {
        "title": part.title,
        "seconds": round(time.monotonic() - began, 1),
        "measured": [one.as_json() for one in bench.notes],
    }


def prepare(args: argparse.Namespace, folder: Path, limits: Limits, course: Course) -> Bench:
    """Raises StartError."""
    course.begin("models", 0)
    ours: Ours | None = None
    contenders: list[Contender]
    if args.url is not None:
        server = elsewhere.running(args.url)
        chosen = elsewhere.models(server, args.model or [])
        contenders = [server]
    else:
        chosen = _models(args.model or [], folder)
        ours = Ours(folder, ("--kv-bits", args.kv_bits) if args.kv_bits else ())
        chunks = CHUNKS[:1] if args.mode == "quick" else CHUNKS
        contenders = [ours, *(MlxLm(folder, chunk) for chunk in chunks)]
        contenders += [peer(text, folder) for text in args.peer or []]
    pages = Pages(_tokenizer(chosen[0]))
    return Bench(args.mode, folder, chosen, ours, contenders, pages, limits, course)


def _kv_bits_configured() -> str:
    """What a server of ours takes where no flag says anything.  Raises ConfigError."""
    return str(config.load({}, os.environ, None).kv_bits or "none")


def _models(sources: Sequence[str], folder: Path) -> list[Model]:
    """Raises UsageError."""
    try:
        return models.chosen(sources, folder, float32=backend.find() == "cpu")
    except ValueError as error:
        raise UsageError(f"--model cannot be used. Allowed: {error}.") from error


def _tokenizer(model: Model) -> Path:
    """Its tokenizer.json; the built-in model's if none can be had."""
    file = Path(model.source, "tokenizer.json")
    if not file.is_file() and "/" in model.source and not file.parent.is_dir():
        try:
            file = Path(hf_hub_download(model.source, "tokenizer.json"))
        except (OSError, ValueError):
            pass
    return file if file.is_file() else builtin.PATH / "tokenizer.json"
