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
from agent_memory.keys import CLIENT_VARIABLE
from agent_memory.ops import backend, blas
from agent_memory.store.state_dir import StateDir
from agent_memory.values import seconds

SETTING = {setting.name: setting for setting in config.SETTINGS}
URL = "http://127.0.0.1:8000"
MOST_STOP_S = 86_400
EXIT_INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong command line is a UsageError."""

    def error(self, message: str) -> Never:
        raise UsageError(f"{message}\n{self.format_usage().strip()}")


def main(argv: Sequence[str] | None = None) -> int:
    own, others = apart(sys.argv[1:] if argv is None else argv)
    try:
        args = parser().parse_args(own, argparse.Namespace(arguments=others))
        code: int = args.run(args)
    except StartError as error:
        sys.stderr.write(f"agent-memory: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return code


def apart(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our arguments, and what comes after -- for a client that is launched."""
    end = argv.index("--") if argv[:1] == ["launch"] and "--" in argv else len(argv)
    return list(argv[:end]), list(argv[end + 1 :])


def parser() -> Parser:
    top = Parser(prog="agent-memory", description="Serves an LLM that remembers your agents.")
    top.add_argument("--version", action="version", version=f"agent-memory {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    add_serve(commands.add_parser("serve", help="serve a model over HTTP"))
    add_status(commands.add_parser("status", help="what the server is at"))
    add_stop(commands.add_parser("stop", help="end the server, in order"))
    add_doctor(commands.add_parser("doctor", help="what is wrong here, and what to do"))
    add_service(commands.add_parser("service", help="a server that the system keeps running"))
    add_agents(commands.add_parser("agents", help="what people do with an agent's memory"))
    add_models(commands.add_parser("models", help="which models there are; load and unload them"))
    add_store(commands.add_parser("store", help="look after what is on disk"))
    add_explain(commands.add_parser("explain", help="why a request was a miss"))
    add_launch(commands.add_parser("launch", help="a coding agent that uses this server"))
    add_demo(commands.add_parser("demo", help="show in a minute what is remembered"))
    add_bench(commands.add_parser("bench", help="what a model switch costs here, and speed"))
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
    read = flag_value(setting.read_flag, setting.allowed)
    how: dict[str, Any] = {"type": read, "metavar": "FILE" if setting.secret else "VALUE"}
    if bool in setting.toml_types:
        how = {"action": argparse.BooleanOptionalAction}
    elif setting.repeats:
        how["action"] = "append"
    command.add_argument(
        setting.flag, dest=setting.name, default=argparse.SUPPRESS, help=text, **how
    )


def flag_value(read: Callable[[str], object], allowed: str) -> Callable[[str], object]:
    def parse(text: str) -> object:
        try:
            return read(text)
        except ValueError as error:
            message = f"{text!r} cannot be used. Allowed: {allowed}."
            raise argparse.ArgumentTypeError(message) from error

    return parse


def add_where(command: argparse.ArgumentParser) -> None:
    """Which state directory is meant."""
    add_config(command)
    add_setting(command, SETTING["state_dir"])
    command.add_argument("--json", action="store_true", help="Print JSON instead.")


def add_url(command: argparse.ArgumentParser) -> None:
    """Which server is asked, and with what key."""
    command.add_argument("--url", default=URL, help=f"Where the server is. Default: {URL}.")
    add_key(command)


def add_key(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"Holds the key that the server asks for. Default: the variable {CLIENT_VARIABLE}.",
    )


def add_status(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=status)
    add_where(command)
    add_key(command)


def add_stop(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=stop)
    add_where(command)
    command.add_argument(
        "--timeout",
        type=flag_value(seconds(0, MOST_STOP_S), f"0 to {MOST_STOP_S}"),
        metavar="SECONDS",
        help="Default: what it promises to take.",
    )


def add_doctor(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=doctor)
    add_where(command)
    command.add_argument(
        "--reset", action="store_true", help="Forgive servers that ended badly: load a model again."
    )


def add_service(command: argparse.ArgumentParser) -> None:
    """What launchd or systemd is told."""
    command.set_defaults(run=service)
    verbs = command.add_subparsers(metavar="VERB", required=True, dest="verb")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=text, description=text)
        verb.add_argument("--kind", choices=("launchd", "systemd"), help="Default: this system's.")
        return verb

    install = add("install", "start it now, at every login, and again when it fails")
    add_config(install)
    add_setting(install, SETTING["state_dir"])
    install.add_argument("--print", action="store_true", help="Only show what would be written.")
    install.add_argument("--force", action="store_true", help="Replace what is installed.")
    add("uninstall", "end it and forget about it; what is remembered stays")
    add("start", "start it now")
    add("stop", "end it until the next login")
    add("status", "what the system says of it")


def add_demo(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=demo)
    command.add_argument("--keep", action="store_true", help="Keep the demo's state directory.")
    command.add_argument("--json", action="store_true", help="Print one JSON object instead.")
    command.add_argument("--kv-bits", choices=("4", "8", "none"), help="As for serve.")
    command.add_argument("--no-preload", action="store_true", help="As for serve.")


def add_bench(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=bench)
    command.add_argument(
        "--mode",
        choices=("quick", "normal", "full"),
        default="normal",
        help="How long: a few minutes to hours.",
    )
    command.add_argument("--only", metavar="PART,PART", help="Some of the parts.")
    command.add_argument(
        "--model", action="append", metavar="SOURCE", help="As for serve; two or more of them."
    )
    command.add_argument("--kv-bits", choices=("4", "8", "none"), help="As for serve.")
    command.add_argument(
        "--peer", action="append", metavar="NAME=COMMAND", help="Another server, with {port}."
    )
    command.add_argument(
        "--url",
        help="A server of ours that already runs, its key in the variable "
        f"{CLIENT_VARIABLE}; --model names its models. Not all is measured.",
    )
    command.add_argument(
        "--out", type=Path, metavar="FOLDER", default=Path("agent-memory-bench"), help="Results."
    )
    command.add_argument("--keep", action="store_true", help="Keep the servers' files and logs.")
    command.add_argument("--json", action="store_true", help="Print JSON instead of tables.")


def add_explain(command: argparse.ArgumentParser) -> None:
    """Asked of a running server."""
    command.set_defaults(run=explain)
    command.add_argument("request_id", metavar="REQUEST_ID", help="X-Request-ID of its answer.")
    add_url(command)
    command.add_argument("--json", action="store_true", help="Print JSON instead.")


def add_launch(command: argparse.ArgumentParser) -> None:
    """Of a running server."""
    command.set_defaults(run=launch)
    command.add_argument("client", choices=("claude", "codex", "opencode"))
    add_url(command)
    command.add_argument("--model", metavar="ID", help="Which of the server's. Default: its first.")
    command.add_argument("--exec", action="store_true", help="Run it; else print how to.")
    command.add_argument("--json", action="store_true", help="Print JSON instead.")
    command.epilog = "What comes after -- is for the client."


def add_agents(command: argparse.ArgumentParser) -> None:
    """Asked of a running server."""
    command.set_defaults(run=agents)
    verbs = command.add_subparsers(metavar="VERB", required=True, dest="verb")
    common = Parser(add_help=False)
    add_url(common)
    common.add_argument("--json", action="store_true", help="Print JSON instead.")
    head = Parser(add_help=False)
    head.add_argument("--head", metavar="ID", help="Which conversation. Default: the newest.")

    def add(name: str, text: str, *parents: Parser, agent: bool = True) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=text, description=text, parents=[common, *parents])
        if agent:
            verb.add_argument("agent", metavar="AGENT")
            verb.epilog = "A name that begins with - comes after --, behind everything else."
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
    add_url(asked)
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
    add_where(common)

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


def status(args: argparse.Namespace) -> int:
    code: int = importlib.import_module("agent_memory.ops.running_commands").status(args)
    return code


def stop(args: argparse.Namespace) -> int:
    code: int = importlib.import_module("agent_memory.ops.running_commands").stop(args)
    return code


def doctor(args: argparse.Namespace) -> int:
    code: int = importlib.import_module("agent_memory.ops.doctor").main(args)
    return code


def service(args: argparse.Namespace) -> int:
    code: int = importlib.import_module("agent_memory.ops.service_commands").main(args)
    return code


def serve(args: argparse.Namespace) -> int:
    settings = config.load(vars(args), os.environ, args.config)
    kind = backend.find()
    if settings.preload and kind == "cpu":
        blas.preload(os.environ)
    if kind == "metal":
        importlib.import_module("agent_memory.ops.doctor").at_start(settings)
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


def launch(args: argparse.Namespace) -> int:
    code: int = importlib.import_module("agent_memory.ops.launch").main(args)
    return code


def bench(args: argparse.Namespace) -> int:
    code: int = importlib.import_module("agent_memory.bench.main").main(args)
    return code


def demo(args: argparse.Namespace) -> int:
    code: int = importlib.import_module("agent_memory.ops.demo").main(args)
    return code


def explain(args: argparse.Namespace) -> int:
    code: int = importlib.import_module("agent_memory.ops.explain").main(args)
    return code
