"""Our server and `mlx_lm.server` on one random model: each setting is a process of its own.

They take turns: while one is asked the others rest.
"""

from contextlib import ExitStack
from pathlib import Path

from agent_memory.bench import servers
from agent_memory.bench.models import Model, random_model
from agent_memory.bench.servers import MlxLm, Ours, Server
from agent_memory.bench.streams import Stream

OURS = ("none", "8", "4")
"""Our --kv-bits."""
THEIRS = ("2048", "512", "256")
"""Their --prefill-step-size, the default first; ours is 256."""
NAMES = (*OURS, *THEIRS)


class Fleet:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = Model("random", str(random_model(folder / "model")), endless=True)

    def start(self, stack: ExitStack, name: str, state: str) -> Server:
        """Loaded, and warmed by one short request.  `state`: names our state directory."""
        if name in OURS:
            ours = Ours(self.folder, ("--kv-bits", name))
            server = stack.enter_context(ours.start([self.model], f"{state}-{name}"))
        else:
            server = stack.enter_context(MlxLm(self.folder, int(name)).start([self.model], state))
        self.ask(server, "warmer", "Hello!")
        return server

    def start_all(self, stack: ExitStack, state: str) -> dict[str, Server]:
        return {name: self.start(stack, name, state) for name in NAMES}

    def ask(self, server: Server, agent: str, prompt: str) -> Stream:
        """A whole answer of one token; then nothing of it is left to do."""
        return server.ask(agent, prompt, self.model)


def in_turn(round_number: int) -> list[str]:
    return servers.in_turn(NAMES, round_number)
