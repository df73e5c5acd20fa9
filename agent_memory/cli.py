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
    add_agents(commands.add_parser("agents", help="what people do with an agent's memory"))
    add_models(commands.add_parser("models", help="which models there are; load and unload them"))
    add_store(commands.add_parser("store", help="look after what is on disk"))
    add_explain(commands.add_parser("explain", help="why a request was a miss"))
    add_demo(commands.add_parser("demo", help="show in a minute what is remembered"))
    return top


def add_serve(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=serve)
    add_config(command)
    for setting in config.SETTINGS:
        add_setting(command, setting)


def add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config", type=Path, metavar="FILE", help=f"Settings file. Default: {config.CONFIG_FILE}."
    )


def add_setting(command: argparse.ArgumentParser, setting: config.Setting) -> None:
    text = f"{setting.text} Allowed: {setting.allowed}. Default: {setting.default}."
    how: dict[str, Any] = {"type": flag_value(setting), "metavar": "VALUE"}
    if bool in setting.toml_types:
        how = {"action": argparse.BooleanOptionalAction}
    elif setting.repeats:
        how["action"] = "append"
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


def add_agents(command: argparse.ArgumentParser) -> None:
    """Asked of a running server."""
    command.set_defaults(run=agents)
    verbs = command.add_subparsers(metavar="VERB", required=True, dest="verb")
    common = Parser(add_help=False)
    common.add_argument("--url", default=URL, help=f"Where the server is. Default: {URL}.")
    common.add_argument("--json", action="store_true", help="Print JSON instead.")
    head = Parser(add_help=False)
    head.add_argument("--head", metavar="ID", help="Which conversation. Default: the newest.")

    def add(name: str, text: str, *parents: Parser, agent: bool = True) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=text, description=text, parents=[common, *parents])
        if agent:
            verb.add_argument("agent", metavar="AGENT")
        return verb

    add("ls", "who is remembered", agent=False)
    show = add("show", "an agent's conversations and their turns")
    show.add_argument("--text", action="store_true", help="Also what was said.")
    fork = add("fork", "a new agent with the same conversation in mind", head)
    fork.add_argument("name", metavar="NEW_NAME")
    rewind = add("rewind", "forget the end of a conversation", head)
    to = rewind.add_mutually_exclusive_group(required=True)
    to.add_argument("--tokens", type=int, metavar="N", help="How many tokens to keep.")
    to.add_argument("--turn", type=int, metavar="N", help="The last turn to keep, from 1.")
    add("pin", "keep it before all others")
    add("unpin", "keep it like all others")
    add("warm", "bring it to RAM ahead of use")
    add("rm", "forget an agent")
    export = add("export", "an agent into one file")
    export.add_argument("-o", "--output", type=Path, metavar="FILE")
    export.add_argument("--force", action="store_true", help="Replace the file if it is there.")
    import_ = add("import", "an agent from such a file", agent=False)
    import_.add_argument("file", type=Path, metavar="FILE")
    import_.add_argument("--name", help="Another name than it had.")


def add_models(command: argparse.ArgumentParser) -> None:
    """Asked of a running server, but for probe."""
    command.set_defaults(run=models)
    verbs = command.add_subparsers(metavar="VERB", required=True, dest="verb")
    common = Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="Print JSON instead.")
    asked = Parser(add_help=False)
    asked.add_argument("--url", default=URL, help=f"Where the server is. Default: {URL}.")
    verbs.add_parser("ls", help="the configured models", parents=[common, asked])
    for name, text in (("load", "bring one into memory"), ("unload", "take one out of memory")):
        verb = verbs.add_parser(name, help=text, description=text, parents=[common, asked])
        verb.add_argument("model", metavar="NAME")
    text = "load a model here, without a server, and say how it would be served"
    probe = verbs.add_parser("probe", help=text, description=text, parents=[common])
    probe.set_defaults(run=probe_model)
    probe.add_argument("source", metavar="SOURCE", help="As for --model of serve.")
    for setting in config.SETTINGS:
        if setting.name in ("kv_bits", "kv_group_size"):
            add_setting(probe, setting)


def add_store(command: argparse.ArgumentParser) -> None:
    """Done here, to a directory."""
    command.set_defaults(run=store)
    verbs = command.add_subparsers(metavar="VERB", required=True, dest="verb")
    common = Parser(add_help=False)
    add_config(common)
    [state_dir] = [setting for setting in config.SETTINGS if setting.name == "state_dir"]
    add_setting(common, state_dir)
    common.add_argument("--json", action="store_true", help="Print JSON instead.")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=text, description=text, parents=[common])

    add("ls", "who is remembered, and how much it takes")
    verify = add("verify", "read every file and check it")
    verify.add_argument("--fix", action="store_true", help="Take bad ones out; no server running.")
    gc = add("gc", "delete what no agent has in mind; no server running")
    gc.add_argument("--dry-run", action="store_true", help="Only say what would go.")
    add("rebuild", "make the index anew from the files; no server running")
    wipe = add("wipe", "delete everything that is remembered; no server running")
    wipe.add_argument("--agent", metavar="NAME", help="Only what is this agent's alone.")
    wipe.add_argument("--yes", action="store_true", help="Yes, delete it.")


def agents(args: argparse.Namespace) -> int:
    code: int = importlib.import_module("agent_memory.ops.agent_commands").main(args)
    return code


def models(args: argparse.Namespace) -> int:
    code: int = importlib.import_module("agent_memory.ops.model_commands").main(args)
    return code


def probe_model(args: argparse.Namespace) -> int:
    """With MLX in this very process."""
    if backend.find() == "cpu":
        blas.preload(os.environ)
    settings = config.load(vars(args), os.environ, None)
    code: int = importlib.import_module("agent_memory.model.show").main(
        args.source, settings.kv_bits, settings.kv_group_size, as_json=args.json
    )
    return code


def store(args: argparse.Namespace) -> int:
    code: int = importlib.import_module("agent_memory.ops.store_commands").main(args)
    return code


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
