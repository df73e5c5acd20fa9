"""Our own server at an address, which somebody else started and uses, too.

Knows how to leave it as it was: agents of a benchmark have names of their own and are removed at
the end.  Main thread.
"""

import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from agent_memory import keys
from agent_memory.bench.models import Model
from agent_memory.bench.servers import OURS, Server
from agent_memory.bench.streams import Message, Stream
from agent_memory.errors import NoServer, RequestRefused, UsageError
from agent_memory.ops.agent_client import AgentClient

REMOVE_S = 10.0
"""What was broken off is remembered a moment later, and has to be removed then."""
POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Running:
    """`key`: "" where it asks for none."""

    url: str
    key: str
    name: str = OURS

    def start(self, models: Sequence[Model], _state: str) -> Server:
        """Nothing is started; it has these models."""
        return Elsewhere(self, {model.name: model.name for model in models})


def running(url: str) -> Running:
    """The key is in a variable, as for other commands.  Raises UsageError."""
    return Running(url.rstrip("/"), keys.of_client(os.environ, None))


def models(server: Running, wanted: Sequence[str]) -> list[Model]:
    """Those of its own that are wanted, else its default.  Raises StartError."""
    with AgentClient(server.url, server.key) as client:
        names = [str(entry["id"]) for entry in client.models()]
    if unknown := [name for name in wanted if name not in names]:
        raise UsageError(
            f"--model: the server at {server.url} has no {', '.join(unknown)}. "
            f"It has: {', '.join(names)}."
        )
    return [Model(name, name) for name in wanted or names[:1]]


class Elsewhere(Server):
    """Nobody here may end it."""

    def __init__(self, server: Running, models: dict[str, str | None]) -> None:
        super().__init__(server.name, server.url, models, None, time.monotonic())
        self._key = server.key
        self._prefix = f"bench-{secrets.token_hex(4)}-"

    def __exit__(self, *_exception: object) -> None:
        try:
            with AgentClient(self.url, self._key) as client:
                _remove(client, self._prefix)
        except (NoServer, RequestRefused):
            pass  # it has ended meanwhile, or does not answer: nothing can be done about it here

    def stream(
        self, agent: str, messages: str | Sequence[Message], max_tokens: int, model: Model
    ) -> Stream:
        name = self._models[model.name]
        return Stream(self.url, self._prefix + agent, messages, max_tokens, name, self._key)


def _remove(client: AgentClient, prefix: str) -> None:
    """Until none of them has come back for a while."""
    deadline = time.monotonic() + REMOVE_S
    quiet = 0
    while quiet < 2 and time.monotonic() < deadline:
        ours = [str(a["id"]) for a in client.agents() if str(a["id"]).startswith(prefix)]
        for agent in ours:
            client.remove(agent)
        quiet = 0 if ours else quiet + 1
        time.sleep(POLL_S)
