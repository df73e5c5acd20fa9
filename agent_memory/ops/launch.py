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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from agent_memory import keys
from agent_memory.errors import UsageError
from agent_memory.keys import CLIENT_VARIABLE as VARIABLE
from agent_memory.ops.agent_client import AgentClient
from agent_memory.ops.terminal import Terminal

NAME = "agent-memory"
PATIENCE_MS = 3_600_000
"""How long a client waits for the first word.  Left alone, Claude Code gives up a long prompt after
five minutes and asks again: it does not count the signs of life that a server sends meanwhile."""


@dataclass(frozen=True, slots=True)
class Key:
    """`value`: clients will not start without one, and a server without keys does not look at it.
    `shell`: how a shell gets it, so that none is ever printed; "" if it is no secret."""

    value: str = NAME
    shell: str = ""

    @classmethod
    def given(cls, environ: Mapping[str, str], file: Path | None) -> "Key":
        """Raises ConfigError."""
        key = keys.of_client(environ, file)
        if not key:
            return cls()
        told = (
            f"$(grep -oE '[^,[:space:]]+' {shlex.quote(str(file))} | head -n 1)"
            if file
            else f"${VARIABLE}"
        )
        return cls(key, f'"{told}"')


NO_KEY = Key()


@dataclass(frozen=True, slots=True)
class Launch:
    command: tuple[str, ...]
    variables: Mapping[str, str]
    key: Key = NO_KEY

    def lines(self) -> list[str]:
        """For a POSIX shell."""
        exports = [f"export {name}={self._quoted(text)}" for name, text in self.variables.items()]
        return [*exports, shlex.join(self.command)]

    def told(self) -> dict[str, object]:
        """For programs, which have the key or know where it is: only who wants it is said."""
        secret = [name for name, text in self.variables.items() if self._is_secret(text)]
        shown = {name: text for name, text in self.variables.items() if name not in secret}
        return {"command": list(self.command), "variables": shown, "key_variables": secret}

    def _quoted(self, text: str) -> str:
        return self.key.shell if self._is_secret(text) else shlex.quote(text)

    def _is_secret(self, text: str) -> bool:
        return bool(self.key.shell) and text == self.key.value


def claude(url: str, model: str, key: Key = NO_KEY) -> Launch:
    tiers = ("OPUS", "SONNET", "HAIKU")
    return Launch(
        ("claude",),
        {
            "ANTHROPIC_BASE_URL": url,
            "ANTHROPIC_AUTH_TOKEN": key.value,
            "ANTHROPIC_MODEL": model,
            **{f"ANTHROPIC_DEFAULT_{tier}_MODEL": model for tier in tiers},
            # A line at the head of the prompt that is another one each time: no memory would hold.
            "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "API_TIMEOUT_MS": str(PATIENCE_MS),
            "CLAUDE_STREAM_IDLE_TIMEOUT_MS": str(PATIENCE_MS),
        },
        key,
    )


def codex(url: str, model: str, key: Key = NO_KEY) -> Launch:
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
    if key.shell:
        settings[f"{provider}.env_key"] = VARIABLE
    flags = [part for name, value in settings.items() for part in ("-c", f"{name}={_toml(value)}")]
    return Launch(("codex", *flags), {VARIABLE: key.value} if key.shell else {}, key)


def opencode(url: str, model: str, key: Key = NO_KEY) -> Launch:
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": NAME,
        "options": {
            "baseURL": f"{url}/v1",
            "apiKey": f"{{env:{VARIABLE}}}" if key.shell else key.value,
            "headerTimeout": PATIENCE_MS,
            "chunkTimeout": PATIENCE_MS,
        },
        "models": {model: {"name": model}},
    }
    config = {"provider": {NAME: provider}, "model": f"{NAME}/{model}"}
    variables = {"OPENCODE_CONFIG_CONTENT": json.dumps(config)}
    return Launch(("opencode",), variables | ({VARIABLE: key.value} if key.shell else {}), key)


CLIENTS: dict[str, Callable[[str, str, Key], Launch]] = {
    "claude": claude,
    "codex": codex,
    "opencode": opencode,
}


def _toml(value: str | int | bool) -> str:
    return json.dumps(value)  # of text, numbers and truth values TOML's spelling is JSON's


def main(args: argparse.Namespace) -> int:
    """Raises StartError."""
    url = args.url.rstrip("/")
    key = Key.given(os.environ, args.api_key_file)
    with AgentClient(url, key.value if key.shell else "") as client:
        models = [str(entry["id"]) for entry in client.models()]
    model = args.model or models[0]
    if model not in models:
        raise UsageError(f"--model: the server has no '{model}', only {', '.join(models)}.")
    launch = CLIENTS[args.client](url, model, key)
    launch = replace(launch, command=(*launch.command, *args.arguments))
    if args.exec:
        run(launch)
    terminal = Terminal(as_json=args.json)
    if terminal.as_json:
        terminal.result(launch.told())
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
