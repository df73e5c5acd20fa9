"""What this machine needs for the work itself: mlx-lm alone, and files that are plainly read.

Asks a child process for each model, `bare`, which is there until the end and idle unless asked.
Each thing is measured once.  Main thread.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from agent_memory.bench.models import Model
from agent_memory.errors import ServerFailed

SMALLEST, LARGEST = 1 << 12, 1 << 28
"""Bytes of the files that are read; other amounts are taken to be as fast as the nearest."""
PIECE = 1 << 20
TRIES = 3
END_S = 5.0


@dataclass(frozen=True, slots=True)
class Scored:
    """`logprob`: of all tokens but the first, natural logarithms, summed up."""

    ids: Sequence[int]
    logprob: float


@dataclass(frozen=True, slots=True)
class KV:
    """Of one token in all layers.  `bits`: of one value, where nothing is quantized."""

    values: int
    bits: int


class Limits:
    """Use it in `with`: at the end no child is left.  All may raise ServerFailed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._children: dict[str, Child] = {}
        self._known: dict[tuple[object, ...], Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        for child in self._children.values():
            child.end()

    @property
    def children(self) -> "list[subprocess.Popen[str]]":
        return [child.process for child in self._children.values()]

    def load_s(self, model: Model) -> float:
        """Loading it, its files in the page cache, to the end of a first step."""
        return float(self._ask(model, "load_s"))

    def prefill_s(self, model: Model, tokens: int) -> float:
        """Computing a prompt of so many tokens, in the better of two chunk sizes."""
        return float(self._ask(model, "prefill_s", tokens=tokens))

    def step_s(self, model: Model, tokens: int, rows: int = 1) -> float:
        """The next token of so many answers at once, each behind so many tokens."""
        return float(self._ask(model, "step_s", tokens=tokens, rows=rows))

    def kv(self, model: Model) -> KV:
        return KV(**self._ask(model, "kv"))

    def score(self, model: Model, text: str, tokens: int) -> Scored:
        """At most so many tokens of this text."""
        return Scored(**self._ask(model, "score", text=text, tokens=tokens))

    def read_s(self, num_bytes: int) -> float:
        """Reading so many bytes of a file that is in the page cache."""
        seconds = self._reading(_size(num_bytes))
        return seconds * num_bytes / _size(num_bytes)

    def read_cold_s(self, num_bytes: int) -> float | None:
        """The same from the disk; None where a file cannot be put out of the page cache."""
        if sys.platform != "linux":
            return None
        seconds = self._reading(_size(num_bytes), cold=True)
        return seconds * num_bytes / _size(num_bytes)

    def _ask(self, model: Model, what: str, **how: object) -> Any:
        key = model.source, what, *how.values()
        if key not in self._known:
            if model.source not in self._children:
                log = self._folder / f"bare-{model.name.replace('/', '-')}.log"
                self._children[model.source] = Child(model, log)
            self._known[key] = self._children[model.source].ask({"do": what, **how})
        return self._known[key]

    def _reading(self, size: int, *, cold: bool = False) -> float:
        key = size, cold
        if key not in self._known:
            file = self._folder / f"read-{size}"
            _write(file, size)
            self._known[key] = min(_read(file, size, cold=cold) for _ in range(TRIES))
            file.unlink()
        seconds: float = self._known[key]
        return seconds


class Child:
    """A process with one model."""

    def __init__(self, model: Model, log_file: Path) -> None:
        self._name = model.name
        self._log_file = log_file
        with log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "agent_memory.bench.bare", model.source],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C is ours to handle
            )

    def ask(self, wanted: dict[str, object]) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(wanted) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # there is no answer then, either
        answer = self.process.stdout.readline()
        if not answer:
            last = self._log_file.read_text("utf-8", "replace")[-2000:]
            raise ServerFailed(
                f"mlx-lm cannot compute {self._name} by itself. Choose another --model, or leave "
                f"out with --only what compares with it. The last it said:\n{last}"
            )
        return json.loads(answer)["value"]

    def end(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()  # in the midst of something nobody waits for
            self.process.wait()
        self.process.stdout.close()


def _size(num_bytes: int) -> int:
    """The power of two that is not smaller, within bounds."""
    return min(max(1 << (num_bytes - 1).bit_length(), SMALLEST), LARGEST)


def _write(file: Path, size: int) -> None:
    piece = os.urandom(min(size, PIECE))
    with file.open("wb") as target:
        for _ in range(size // len(piece)):
            target.write(piece)
        target.flush()
        os.fsync(target.fileno())  # only what is on the disk can leave the page cache


def _read(file: Path, size: int, *, cold: bool) -> float:
    room = bytearray(size)
    room[:: 1 << 12] = b"\1" * len(room[:: 1 << 12])  # memory that is there
    with file.open("rb", buffering=0) as source:
        if cold and sys.platform == "linux":
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.monotonic()
        at = 0
        while at < size:
            at += source.readinto(memoryview(room)[at:]) or 0
        return time.monotonic() - began
