"""The servers that are compared: ours, `mlx_lm.server`, and any other that speaks OpenAI.

Each is a process of its own with the same models, started and ended the same way, and asked over
HTTP.  Knows how each is started and what each calls a model.  Main thread.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self, TypeVar

import httpx
from prometheus_client.parser import text_string_to_metric_families

from agent_memory.bench.models import Model
from agent_memory.bench.streams import Message, Stream
from agent_memory.errors import ServerFailed, UsageError
from agent_memory.ops.process import ServerProcess
from agent_memory.processes import output

OURS = "agent-memory"
MLX_LM = "mlx_lm.server"
CHUNKS = (2048, 256)
"""Prompt tokens in a step of `mlx_lm.server`: its default, and ours."""

T = TypeVar("T")

START_S = 300.0
STOP_S = 60.0
POLL_S = 0.02
QUIET_S = 0.3
QUIET_SHARE = 0.1
"""Of a core, at most, in a server that is at rest."""


@dataclass(frozen=True, slots=True)
class Ended:
    """`stages`: seconds of each, where a server tells them.  `port_free`: for others to take."""

    seconds: float
    exit_code: int
    port_free: bool
    stages: dict[str, float] = field(default_factory=dict)


class Child(Protocol):
    """A server's process, whoever made it."""

    @property
    def pid(self) -> int: ...
    def stop(self) -> Ended: ...
    def kill(self) -> None: ...
    def end(self) -> None: ...


class Server:
    """One that runs.  Use it in `with`: whatever happens inside, none is left behind.

    `started_s`: from nothing to answering, its first model loaded.
    """

    def __init__(
        self, name: str, url: str, models: dict[str, str | None], child: Child | None, began: float
    ) -> None:
        self.name = name
        self.url = url
        self.child = child
        self._models = models
        self.started_s = time.monotonic() - began

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self.child is not None:
            self.child.end()

    @property
    def pid(self) -> int:
        assert self.child is not None, "somebody else's server"
        return self.child.pid

    def stream(
        self, agent: str, messages: str | Sequence[Message], max_tokens: int, model: Model
    ) -> Stream:
        return Stream(self.url, agent, messages, max_tokens, self._models[model.name])

    def ask(
        self,
        agent: str,
        messages: str | Sequence[Message],
        model: Model,
        max_tokens: int = 1,
    ) -> Stream:
        """A whole answer; then nothing of it is left to do, on the disk neither."""
        with self.stream(agent, messages, max_tokens, model) as stream:
            stream.wait()
        self.rest()
        return stream

    def stop(self) -> Ended:
        """SIGTERM, as an operator would, and wait."""
        assert self.child is not None, "somebody else's server"
        return self.child.stop()

    def kill(self) -> None:
        """As a crash would."""
        assert self.child is not None, "somebody else's server"
        self.child.kill()

    def rest(self) -> None:
        """Until it computes and writes nothing any more."""
        if self.child is None:
            time.sleep(QUIET_S)
            return
        while True:
            before = cpu_seconds(self.pid)
            time.sleep(QUIET_S)
            if cpu_seconds(self.pid) - before <= QUIET_SHARE * QUIET_S:
                return

    @property
    def resident_bytes(self) -> int:
        """Of its process; on macOS this is not all that a GPU uses."""
        return 1024 * int(output("ps", "-o", "rss=", "-p", str(self.pid)).strip() or 0)


class Contender(Protocol):
    """How one server is started, again and again.  Each time in a process of its own."""

    @property
    def name(self) -> str: ...
    def start(self, models: Sequence[Model], state: str) -> Server:
        """With the first of the models loaded.

        `state`: a name; what remembers, remembers what another of this name left.  Raises
        ServerFailed.
        """
        ...


@dataclass(frozen=True, slots=True)
class Ours:
    """`flags`: of `serve`, after those every benchmark sets."""

    folder: Path
    flags: tuple[str, ...] = ()
    name: str = OURS

    def state_dir(self, state: str) -> Path:
        return self.folder / f"state-{state}"

    def start(self, models: Sequence[Model], state: str, *more: str) -> Server:
        """`more`: flags for this time."""
        config = self.folder / "config.toml"
        config.touch()
        flags = ["--config", str(config), "--state-dir", str(self.state_dir(state))]
        for model in models:
            flags += ["--model", f"{model.name}={model.source}"]
        began = time.monotonic()
        process = ServerProcess([*flags, *self.flags, *more], _log(self.folder))
        child = OwnChild(process)
        try:
            process.wait_loaded()
        except BaseException:
            child.end()
            raise
        names: dict[str, str | None] = {model.name: model.name for model in models}
        return Server(self.name, f"http://127.0.0.1:{process.port}", names, child, began)


@dataclass(frozen=True, slots=True)
class MlxLm:
    """`chunk`: its --prefill-step-size.  `flags`: more, and `told` what its name says of them."""

    folder: Path
    chunk: int
    flags: tuple[str, ...] = ()
    told: str = ""

    @property
    def name(self) -> str:
        return f"{MLX_LM} {self.chunk}{self.told}"

    def start(self, models: Sequence[Model], _state: str) -> Server:
        command = [sys.executable, "-m", "mlx_lm", "server", "--model", models[0].source]
        command += ["--host", "127.0.0.1", "--port", "{port}", "--temp", "0"]
        command += ["--prefill-step-size", str(self.chunk), *self.flags]
        names: dict[str, str | None] = {model.name: model.source for model in models}
        return _start(self.name, command, names, self.folder)


@dataclass(frozen=True, slots=True)
class Peer:
    """Any other: `command` as a shell would split it, with {port} and {model} in it."""

    folder: Path
    name: str
    command: str

    def start(self, models: Sequence[Model], _state: str) -> Server:
        command = [word.replace("{model}", models[0].source) for word in shlex.split(self.command)]
        names: dict[str, str | None] = {model.name: model.source for model in models}
        return _start(self.name, command, names, self.folder)


def peer(text: str, folder: Path) -> Peer:
    """Of `NAME=COMMAND`.  Raises UsageError."""
    name, equals, command = text.partition("=")
    if not (name and equals and "{port}" in command):
        raise UsageError(
            f"--peer {text!r} cannot be used. Allowed: NAME=COMMAND, with {{port}} in the command "
            "for the port it shall listen on, and {model} for the model's folder or hub id."
        )
    return Peer(folder, name, command)


class OwnChild:
    """A server of ours."""

    def __init__(self, process: ServerProcess) -> None:
        self.process = process

    @property
    def pid(self) -> int:
        return self.process.pid

    def stop(self) -> Ended:
        began = time.monotonic()
        stopped = self.process.stop()
        seconds = time.monotonic() - began
        stages = {line["stage"]: line["ms"] / 1000 for line in stopped.stages}
        return Ended(seconds, stopped.exit_code, _is_free(self.process.port), stages)

    def kill(self) -> None:
        self.process.signal(signal.SIGKILL)
        self.process.wait(STOP_S)

    def end(self) -> None:
        self.process.end()


class OtherChild:
    """A server of somebody else's, in a group of its own with all that it starts."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int) -> None:
        self._process = process
        self._port = port

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> Ended:
        began = time.monotonic()
        self._process.terminate()
        try:
            code = self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
            code = self._process.returncode
        return Ended(time.monotonic() - began, code, _is_free(self._port))

    def kill(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)
        self._process.wait(STOP_S)

    def end(self) -> None:
        if self._process.poll() is None:
            self.stop()


def _start(name: str, command: list[str], models: dict[str, str | None], folder: Path) -> Server:
    port, log_file, began = _free_port(), _log(folder), time.monotonic()
    command = [word.replace("{port}", str(port)) for word in command]
    try:
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
    except OSError as error:
        raise ServerFailed(f"{name} cannot be started: {error}") from error
    child, url = OtherChild(process, port), f"http://127.0.0.1:{port}"
    try:
        _wait_until(lambda: _answers(url), process, name, log_file)
    except BaseException:
        child.end()
        raise
    return Server(name, url, models, child, began)


def _wait_until(
    done: Callable[[], bool], process: "subprocess.Popen[bytes]", name: str, log_file: Path
) -> None:
    deadline = time.monotonic() + START_S
    while not done():
        if process.poll() is not None or time.monotonic() > deadline:
            last = log_file.read_text("utf-8", "replace")[-2000:]
            raise ServerFailed(f"{name} did not start. The last it said:\n{last}")
        time.sleep(POLL_S)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/models", trust_env=False, timeout=5).is_success
    except httpx.TransportError:
        return False


def start_all(
    stack: ExitStack, contenders: Sequence[Contender], models: Sequence[Model], state: str
) -> dict[str, Server]:
    return {c.name: stack.enter_context(c.start(models, state)) for c in contenders}


def metric(server: Server, name: str) -> float:
    """One of ours."""
    text = httpx.get(f"{server.url}/metrics", trust_env=False).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    return families[f"agent_memory_{name}"].samples[0].value


def in_turn(these: Sequence[T], round_number: int) -> list[T]:
    """All of them; who comes first changes from round to round."""
    first = round_number % len(these)
    return [*these[first:], *these[:first]]


def cpu_seconds(pid: int) -> float:
    """Of a process so far; 0 once it is gone."""
    if sys.platform == "linux":
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    minutes, _, seconds = output("ps", "-o", "time=", "-p", str(pid)).strip().rpartition(":")
    return 60 * float(minutes or 0) + float(seconds or 0)


def _log(folder: Path) -> Path:
    return folder / f"server-{time.monotonic_ns()}.log"


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
