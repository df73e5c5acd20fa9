"""The command `launch`: a coding agent with the settings that make it use this server.

Knows how each client is told where its model is, and what it would otherwise send that spoils its
own memory.  What is printed is what is run: nothing is written anywhere.  Main thread.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from agent_memory.errors import UsageError
from agent_memory.ops.agent_client import AgentClient
from agent_memory.ops.terminal import Terminal

NAME = "agent-memory"
ANY_KEY = "agent-memory"
"""Clients will not start without a key, and a server on loopback does not look at it."""
PATIENCE_MS = 3_600_000
"""How long a client waits for the first word.  Left alone, it gives up a long prompt after five
minutes and asks again, for it does not count the signs of life that a server sends meanwhile."""


@dataclass(frozen=True, slots=True)
class Launch:
    command: tuple[str, ...]
    variables: Mapping[str, str]

    def lines(self) -> list[str]:
        """For a POSIX shell."""
        exports = [f"export {name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return [*exports, shlex.join(self.command)]


def claude(url: str, model: str) -> Launch:
    tiers = ("OPUS", "SONNET", "HAIKU")
    return Launch(
        ("claude",),
        {
            "ANTHROPIC_BASE_URL": url,
            "ANTHROPIC_AUTH_TOKEN": ANY_KEY,
            "ANTHROPIC_MODEL": model,
            **{f"ANTHROPIC_DEFAULT_{tier}_MODEL": model for tier in tiers},
            # A line at the head of the prompt that is another one each time: no memory would hold.
            "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "API_TIMEOUT_MS": str(PATIENCE_MS),
            "CLAUDE_STREAM_IDLE_TIMEOUT_MS": str(PATIENCE_MS),
        },
    )


def codex(url: str, model: str) -> Launch:
    provider = f"model_providers.{NAME}"
    settings: dict[str, str | int | bool] = {
        "model_provider": NAME,
        "model": model,
        f"{provider}.name": NAME,
        f"{provider}.base_url": f"{url}/v1",
        f"{provider}.wire_api": "responses",
        f"{provider}.requires_openai_auth": False,
        f"{provider}.stream_idle_timeout_ms": PATIENCE_MS,
    }
    flags = [part for name, value in settings.items() for part in ("-c", f"{name}={_toml(value)}")]
    return Launch(("codex", *flags), {})


def opencode(url: str, model: str) -> Launch:
    waiting = {"headerTimeout": PATIENCE_MS, "chunkTimeout": PATIENCE_MS}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": NAME,
        "options": {"baseURL": f"{url}/v1", "apiKey": ANY_KEY, **waiting},
        "models": {model: {"name": model}},
    }
    config = {"provider": {NAME: provider}, "model": f"{NAME}/{model}"}
    return Launch(("opencode",), {"OPENCODE_CONFIG_CONTENT": json.dumps(config)})


CLIENTS: dict[str, Callable[[str, str], Launch]] = {
    "claude": claude,
    "codex": codex,
    "opencode": opencode,
}


def _toml(value: str | int | bool) -> str:
    return json.dumps(value)  # of text, numbers and truth values TOML's spelling is JSON's


def main(args: argparse.Namespace) -> int:
    """Raises StartError."""
    url = args.url.rstrip("/")
    with AgentClient(url) as client:
        models = [str(entry["id"]) for entry in client.models()]
    model = args.model or models[0]
    if model not in models:
        raise UsageError(f"--model: the server has no '{model}', only {', '.join(models)}.")
    launch = CLIENTS[args.client](url, model)
    launch = Launch((*launch.command, *args.arguments), launch.variables)
    if args.exec:
        run(launch)
    terminal = Terminal(as_json=args.json)
    if terminal.as_json:
        terminal.result({"command": list(launch.command), "variables": dict(launch.variables)})
    else:
        for line in launch.lines():
            terminal.say(line)
    return 0


def run(launch: Launch) -> NoReturn:
    """Become the client."""
    program = shutil.which(launch.command[0])
    if program is None:
        raise UsageError(
            f"There is no '{launch.command[0]}' on the PATH. Install it, or leave out --exec and "
            "run what is printed where it is."
        )
    sys.stdout.flush()
    os.execve(program, list(launch.command), {**os.environ, **launch.variables})
