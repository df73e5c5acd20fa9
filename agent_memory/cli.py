"""The command `agent-memory`: reads flags, starts what they name, turns errors into exit codes.

Knows every command.  Imports what is heavy only when its command runs, so that help, bad flags and
a taken state directory answer at once.  Main thread.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Never

from agent_memory import __version__, config
from agent_memory.errors import StartError, UsageError
from agent_memory.ops import backend, blas
from agent_memory.store.state_dir import StateDir

URL = "http://127.0.0.1:8000"


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong command line is a UsageError."""

    def error(self, message: str) -> Never:
        raise UsageError(f"{message}\n{self.format_usage().strip()}")


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = parser().parse_args(argv)
        code: int = args.run(args)
    except StartError as error:
        sys.stderr.write(f"agent-memory: {error}\n")
        return error.exit_code
    return code


def parser() -> Parser:
    top = Parser(prog="agent-memory", description="Serves an LLM that remembers your agents.")
    top.add_argument("--version", action="version", version=f"agent-memory {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    add_serve(commands.add_parser("serve", help="serve a model over HTTP"))
    add_explain(commands.add_parser("explain", help="why a request was a miss"))
    add_demo(commands.add_parser("demo", help="show in a minute what is remembered"))
    return top


def add_serve(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=serve)
    command.add_argument(
        "--config", type=Path, metavar="FILE", help=f"Settings file. Default: {config.CONFIG_FILE}."
    )
    for setting in config.SETTINGS:
        text = f"{setting.text} Allowed: {setting.allowed}. Default: {setting.default}."
        how: dict[str, Any] = {"type": flag_value(setting), "metavar": "VALUE"}
        if bool in setting.toml_types:
            how = {"action": argparse.BooleanOptionalAction}
        command.add_argument(setting.flag, default=argparse.SUPPRESS, help=text, **how)


def flag_value(setting: config.Setting) -> Callable[[str], object]:
    def parse(text: str) -> object:
        try:
            return setting.parse(text)
        except ValueError as error:
            message = f"{text!r} cannot be used. Allowed: {setting.allowed}."
            raise argparse.ArgumentTypeError(message) from error

    return parse


def add_demo(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=demo)
    command.add_argument("--keep", action="store_true", help="Keep the demo's state directory.")
    command.add_argument("--json", action="store_true", help="Print one JSON object instead.")
    command.add_argument("--kv-bits", choices=("4", "8", "none"), help="As for serve.")
    command.add_argument("--no-preload", action="store_true", help="As for serve.")


def add_explain(command: argparse.ArgumentParser) -> None:
    """Asked of a running server."""
    command.set_defaults(run=explain)
    command.add_argument("request_id", metavar="REQUEST_ID", help="X-Request-ID of its answer.")
    command.add_argument("--url", default=URL, help=f"Where the server is. Default: {URL}.")
    command.add_argument("--json", action="store_true", help="Print JSON instead.")


def serve(args: argparse.Namespace) -> int:
    settings = config.load(vars(args), os.environ, args.config)
    kind = backend.find()
    if settings.preload and kind == "cpu":
        blas.preload(os.environ)
    state_dir = StateDir.open(settings.state_dir)
    try:
        if not settings.model_chosen:
            sys.stderr.write(
                "agent-memory: no model is configured, so the small built-in one serves; "
                "name yours with --model DIRECTORY_OR_NAME\n"
            )
        run = importlib.import_module("agent_memory.server.run")
        code: int = run.main(settings, state_dir)
        return code
    finally:
        state_dir.close()


def demo(args: argparse.Namespace) -> int:
    code: int = importlib.import_module("agent_memory.ops.demo").main(args)
    return code


def explain(args: argparse.Namespace) -> int:
    code: int = importlib.import_module("agent_memory.ops.explain").main(args)
    return code
