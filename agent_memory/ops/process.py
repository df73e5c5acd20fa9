"""A server of our own as a child process: started, listened to, stopped.

Knows how to start `serve` and how to read its log, which goes to a file, so that a server never
waits for its reader and outlives it in order.  Knows nothing of HTTP.  Main thread.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from agent_memory.errors import ServerFailed

POLL_S = 0.01
START_S = 120.0
STOP_S = 60.0  # above the server's own bound, 25 + 15 s by default
KILL_S = 5.0
LAST_LINES = 20

SPOKEN_TO = {"AGENT_MEMORY_UDS": "none", "AGENT_MEMORY_API_KEYS": "none"}
"""Whatever is set outside: on a port and without a key, as whoever starts it here expects."""

Line = dict[str, Any]
"""One log line.  What is not JSON is {"event": "", "text": the line}."""


@dataclass(frozen=True, slots=True)
class Stopped:
    """`stages`: the log lines of the shutdown's stages, in order."""

    exit_code: int
    stages: list[Line]


class ServerProcess:
    """Use it in `with`: whatever happens inside, no server is left behind.

    `port` is known once it is made, on a free one unless the flags name one.  `environ`: variables
    on top of our own.
    """

    def __init__(
        self, flags: Sequence[str], log_file: Path, environ: Mapping[str, str] | None = None
    ) -> None:
        self._log_file = log_file
        command = [sys.executable, "-m", "agent_memory", "serve", "--host", "127.0.0.1"]
        command += ["--port", "0", "--log-format", "json", *flags]
        with log_file.open("wb") as log:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **SPOKEN_TO, **(environ or {})},
            )
        try:
            self.port = int(self.wait_for("server_listening", START_S)["port"])
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.end()

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def early(self) -> list[str]:
        """What was said before there was a log: hints, for people."""
        return [line["text"] for line in self.lines() if "text" in line]

    def wait_loaded(self) -> Line:
        """The line that says how the model is kept.  Raises ServerFailed."""
        return self.wait_for("model_ready", START_S, or_fail="model_failed")

    def signal(self, number: signal.Signals = signal.SIGTERM) -> float:
        """When it was sent, on the monotonic clock."""
        self._child.send_signal(number)
        return time.monotonic()

    def wait(self, timeout_s: float) -> int:
        """Its exit status.  Raises subprocess.TimeoutExpired."""
        return self._child.wait(timeout_s)

    def lines(self) -> list[Line]:
        """All so far; a line still being written is not among them."""
        written = self._log_file.read_text("utf-8", "replace")
        return [_parsed(line) for line in written.split("\n")[:-1] if line]

    def wait_for(
        self, event: str, timeout_s: float, *, or_fail: str | None = None, **fields: str
    ) -> Line:
        """The first line of that event with those fields.

        Raises ServerFailed if the event `or_fail` or the end of the process comes instead.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            ended = self._child.poll() is not None  # asked first: then every line is written
            for line in self.lines():
                if line["event"] == event and fields.items() <= line.items():
                    return line
                if line["event"] == or_fail:
                    raise ServerFailed(f"The server failed: {line.get('reason')}")
            if ended or time.monotonic() > deadline:
                raise ServerFailed(self._why(event, ended=ended))
            time.sleep(POLL_S)

    def _why(self, event: str, *, ended: bool) -> str:
        what = f"ended with {self._child.returncode}" if ended else "is still silent"
        last = self._log_file.read_text("utf-8", "replace").splitlines()[-LAST_LINES:]
        return "\n".join([f"The server {what} before '{event}'. The last it said:", *last])

    def stop(self) -> Stopped:
        """SIGTERM, as an operator would, and wait.  Raises ServerFailed if it does not end."""
        self.signal()
        try:
            exit_code = self.wait(STOP_S)
        except subprocess.TimeoutExpired as error:
            raise ServerFailed(f"The server did not end within {STOP_S:.0f} s.") from error
        return Stopped(exit_code, [x for x in self.lines() if x["event"] == "shutdown_stage"])

    def end(self) -> None:
        """No server from here on, gracefully if it can be had soon."""
        if self._child.poll() is None:
            self._child.terminate()
        try:
            self._child.wait(KILL_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


def _parsed(text: str) -> Line:
    try:
        line = json.loads(text)
    except ValueError:
        line = None
    return line if isinstance(line, dict) and "event" in line else {"event": "", "text": text}
