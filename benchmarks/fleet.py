"""Our server and `mlx_lm.server` on one random model: each setting is a process of its own.

They take turns: while one is asked the others rest.
"""

import time
from contextlib import ExitStack
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from agent_memory.ops.process import ServerProcess
from benchmarks import random_model
from benchmarks.peers import MlxLmServer
from benchmarks.streams import Stream

OURS = ("none", "8", "4")
"""Our --kv-bits."""
THEIRS = ("2048", "512", "256")
"""Their --prefill-step-size, the default first; ours is 256."""
NAMES = (*OURS, *THEIRS)

QUIET_S = 0.3
TICKS = 100  # of a second, in /proc

Server = ServerProcess | MlxLmServer


class Fleet:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = random_model.make(folder / "model")

    def start(self, stack: ExitStack, name: str, state: str) -> Server:
        """Loaded, and warmed by one short request.  `state`: names our state directory."""
        log = self.folder / f"log-{time.monotonic_ns()}"
        server: Server
        if name in OURS:
            flags = ["--model", str(self.model), "--kv-bits", name]
            flags += ["--state-dir", str(self.folder / f"{state}-{name}")]
            server = stack.enter_context(ServerProcess(flags, log))
            server.wait_loaded()
        else:
            server = stack.enter_context(MlxLmServer(self.model, int(name), log))
        ask(server, "warmer", "Hello!")
        return server

    def start_all(self, stack: ExitStack, state: str) -> dict[str, Server]:
        return {name: self.start(stack, name, state) for name in NAMES}


def in_turn(round_number: int) -> tuple[str, ...]:
    """Every name; who comes first changes from round to round."""
    first = round_number % len(NAMES)
    return NAMES[first:] + NAMES[:first]


def ask(server: Server, agent: str, prompt: str) -> Stream:
    """A whole answer of one token; then nothing of it is left to do."""
    with Stream(server.port, agent, prompt, 1) as stream:
        stream.wait()
    rest(server)
    return stream


def rest(server: Server) -> None:
    """Until it computes and writes nothing any more."""
    while True:
        before = _cpu_ticks(server.pid)
        time.sleep(QUIET_S)
        if _cpu_ticks(server.pid) - before <= 0.1 * QUIET_S * TICKS:
            return


def _cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def metric(server: Server, name: str) -> float:
    """One of ours."""
    text = httpx.get(f"http://127.0.0.1:{server.port}/metrics", trust_env=False).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    return families[f"agent_memory_{name}"].samples[0].value
