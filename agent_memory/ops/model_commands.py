"""The command `models`: which models a running server has, and bringing them in and out.

Knows how they look to people.  Main thread; a load is waited for in another, so that its progress
can be shown.
"""

import argparse
import threading
from concurrent.futures import Future
from typing import Any

from agent_memory.ops.agent_client import AgentClient
from agent_memory.ops.terminal import Terminal, number

LOOK_S = 0.5
COLUMNS = ("", "model", "status", ">context", ">bytes per token", "mode")


def main(args: argparse.Namespace) -> int:
    """Raises StartError."""
    terminal = Terminal(as_json=args.json)
    with AgentClient.named(args) as client:
        if args.verb == "ls":
            _show(terminal, client.models())
        elif args.verb == "load":
            _show_one(terminal, _load(args, client, terminal))
        else:
            _show_one(terminal, client.model_verb(args.model, "unload"))
    return 0


def _show(terminal: Terminal, models: list[dict[str, Any]]) -> None:
    if terminal.as_json:
        terminal.result(models)
        return
    terminal.table(COLUMNS, [_row(model) for model in models])
    for model in models:
        for what in [*model.get("warnings", []), *filter(None, [model.get("failure")])]:
            terminal.say(f"{model['id']}: {what}")


def _show_one(terminal: Terminal, model: dict[str, Any]) -> None:
    if terminal.as_json:
        terminal.result(model)
    else:
        _show(terminal, [model])


def _row(model: dict[str, Any]) -> list[str]:
    marks = ("*" if model["default"] else "") + ("p" if model["pinned"] else "")
    kv = model.get("kv")
    if kv is None:
        return [marks, model["id"], _status(model), "", "", ""]
    context = number(model["context_length"])
    return [marks, model["id"], _status(model), context, number(kv["bytes_per_token"]), kv["mode"]]


def _status(model: dict[str, Any]) -> str:
    progress = model.get("progress") or {}
    if not progress:
        return str(model["status"])
    layers = f" {progress['done']}/{progress['of']}" if progress["of"] else ""
    return f"{model['status']}: {progress['step']}{layers}, {progress['elapsed_s']:.0f} s"


def _load(args: argparse.Namespace, client: AgentClient, terminal: Terminal) -> dict[str, Any]:
    loading: Future[dict[str, Any]] = Future()

    def load() -> None:
        try:
            with AgentClient.named(args) as own:
                loading.set_result(own.model_verb(args.model, "load"))
        except BaseException as error:
            loading.set_exception(error)

    threading.Thread(target=load, daemon=True).start()
    with terminal.counting() as shown:
        task = shown.add_task(args.model, total=None)
        while not loading.done():
            try:
                return loading.result(LOOK_S)
            except TimeoutError:
                pass
            for model in client.models():
                progress = model.get("progress") or {}
                if model["id"] == args.model and progress:
                    what = f"{args.model}: {progress['step']}"
                    of = progress["of"] or None
                    shown.update(task, description=what, completed=progress["done"], total=of)
    return loading.result()
