"""The server of a state directory as others see it: from its lock, its notes and its answers.

The lock says which process it is, run/starts.jsonl what it is at, even while it answers nobody any
more, HTTP the rest.  Main thread.
"""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from agent_memory.errors import RequestRefused
from agent_memory.ops.agent_client import bearer
from agent_memory.store import starts
from agent_memory.store.starts import Start
from agent_memory.store.state_dir import Holder, StateDir

ANSWER_S = 3.0
POLL_S = 0.05
SPARE_S = 5.0
METRIC = "agent_memory_"
UNIX = "unix:"

Answers = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Running:
    path: Path
    holder: Holder

    @classmethod
    def find(cls, path: Path) -> "Running | None":
        """None if no process holds the directory.  One that holds it and is no server, as those of
        `agent-memory store` are, has no url."""
        holder = StateDir.holder(path)
        return cls(path, holder) if holder and holder.is_running else None

    def start(self) -> Start | None:
        """What it wrote of itself, also once it has ended."""
        for start in reversed(read_starts(self.path)):
            if start.pid == self.holder.pid and start.boot == self.holder.boot:
                return start
        return None

    def stop(self, timeout_s: float | None, tell: Callable[[str], object]) -> Start | None:
        """SIGTERM, and wait until the process is gone; what it wrote at last.

        `tell` hears of each stage.  Raises RequestRefused if it is not gone in time.
        """
        if not self.holder.url:
            raise RequestRefused(
                f"Process {self.holder.pid} is at work in {self.path} and is no server. Wait until "
                "it has ended."
            )
        limit_s = self.holder.stop_s + SPARE_S if timeout_s is None else timeout_s
        deadline, last = time.monotonic() + limit_s, ""
        self._signal()
        while self.holder.is_running:
            start = self.start()
            stage = start.phase if start else ""
            if stage != last:
                tell(stage)
                last = stage
            if time.monotonic() > deadline:
                raise RequestRefused(
                    f"Process {self.holder.pid} is still there after {limit_s:.0f} s, at "
                    f"'{last}'. Wait longer with --timeout. If it never ends, 'kill -USR1' writes "
                    f"its stacks to {self.path / 'run/fault.log'} and 'kill -9' ends it, which "
                    "costs at most the turns that were running."
                )
            time.sleep(POLL_S)
        return self.start()

    def _signal(self) -> None:
        try:
            os.kill(self.holder.pid, signal.SIGTERM)
        except ProcessLookupError:
            pass  # it has just gone by itself
        except PermissionError as error:
            raise RequestRefused(
                f"Process {self.holder.pid} belongs to another user. Stop it as that one."
            ) from error

    def asked(self, key: str = "") -> Answers:
        """What it answers about itself; without what it does not answer in time."""
        answers: Answers = {}
        url, transport = reached(self.holder.url)
        with httpx.Client(
            base_url=url,
            transport=transport,
            headers=bearer(key),
            timeout=ANSWER_S,
            trust_env=False,
            verify=False,  # there is no TLS, and to read all certificates takes a while
        ) as client:
            for path in ("/healthz", "/readyz", "/v1/models", "/v1/agents", "/metrics"):
                try:
                    answer = client.get(path)
                    answers[path] = figures(answer.text) if path == "/metrics" else answer.json()
                except (httpx.HTTPError, ValueError):
                    break  # and none of the others
        return answers


def reached(url: str) -> tuple[str, httpx.HTTPTransport | None]:
    """Where HTTP is spoken, and through what if it is a Unix socket."""
    if url.startswith(UNIX):
        return "http://localhost", httpx.HTTPTransport(uds=url.removeprefix(UNIX))
    return url, None


def read_starts(path: Path) -> list[Start]:
    try:
        return starts.read(path / "run" / "starts.jsonl")
    except OSError:
        return []


def figures(text: str) -> dict[str, float]:
    """Samples without labels, by their name without our prefix."""
    samples = (line.rsplit(" ", 1) for line in text.splitlines() if line.startswith(METRIC))
    return {name.removeprefix(METRIC): float(value) for name, value in samples if "{" not in name}
