"""How long a fork takes, and what it writes.

    python -m benchmarks.fork

A real server with the built-in model holds an agent of some 2,000 tokens.  It is forked 100 times
over HTTP; timed is the whole round trip, so what the server itself takes is less.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx

from agent_memory.bench.texts import texts
from agent_memory.ops.client import Client
from agent_memory.ops.process import ServerProcess

NUM_FORKS = 100
NUM_TOKENS = 2000


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="agent-memory-fork-") as home:
        folder = Path(home)
        (folder / "config.toml").touch()
        flags = ["--config", str(folder / "config.toml"), "--state-dir", str(folder / "state")]
        with ServerProcess(flags, folder / "log") as server:
            server.wait_loaded()
            run(server.port)


def run(port: int) -> None:
    question = {"role": "user", "content": next(texts(NUM_TOKENS))}
    with Client(port) as client:
        client.chat("parent", [question], 8)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
        wait_on_disk(http)
        agent = http.get("/v1/agents/parent").json()
        before, times = bytes_written(http), []
        for number in range(NUM_FORKS):
            began = time.perf_counter()
            answer = http.post("/v1/agents/parent/fork", json={"name": f"fork-{number}"})
            times.append(1000 * (time.perf_counter() - began))
            answer.raise_for_status()
        written = bytes_written(http) - before
    print_line(f"an agent of {agent['tokens']} tokens in {agent['blocks']['own']} blocks")
    print_line(
        f"{NUM_FORKS} forks over HTTP: median {statistics.median(times):.2f} ms, "
        f"90 of 100 within {statistics.quantiles(times, n=10)[-1]:.2f} ms, "
        f"longest {max(times):.2f} ms; payload bytes written: {written:.0f}"
    )


def wait_on_disk(http: httpx.Client) -> None:
    while True:
        agent = http.get("/v1/agents/parent").json()
        if "tiers" in agent and agent["tiers"]["disk"] == agent["tokens"]:
            return
        time.sleep(0.05)


def bytes_written(http: httpx.Client) -> float:
    name = "agent_memory_bytes_written_total "
    lines = http.get("/metrics").text.splitlines()
    return next(float(line.removeprefix(name)) for line in lines if line.startswith(name))


def print_line(text: str) -> None:
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
