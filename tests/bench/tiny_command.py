"""The whole command with one part of a few seconds.

python -m tests.bench.tiny_command bench --only tiny …
"""

import sys
from contextlib import ExitStack

from agent_memory import cli
from agent_memory.bench import main
from agent_memory.bench.bench import Bench, Mode, Part
from agent_memory.bench.servers import start_all

ROUNDS: dict[Mode, int] = {"quick": 1, "normal": 2, "full": 1000}


def measure(bench: Bench) -> None:
    rounds = ROUNDS[bench.mode]
    model = bench.models[0]
    bench.course.steps(1 + rounds)
    with ExitStack() as stack:
        with bench.course.step("starting"):
            servers = start_all(stack, bench.contenders, [model], "tiny")
        for n in range(rounds):
            with bench.course.step(f"round {n + 1}"):
                for name, server in servers.items():
                    answer = server.ask(f"agent-{n}", bench.pages.take(100), model)
                    seconds = answer.first_token_s
                    bench.notes.add("first token", {"tokens": 100}, "ms", name, 1000 * seconds)


if __name__ == "__main__":
    seconds: dict[Mode, int] = {"quick": 5, "normal": 8, "full": 100}
    here = Part("here", "Here alone", lambda _: None, seconds)
    main.PARTS = (Part("tiny", "A tiny part", measure, seconds, anywhere=True), here)
    sys.exit(cli.main())
