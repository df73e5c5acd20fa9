"""The commands `status` and `stop`: the server of a state directory, whatever it is at.

Main thread.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from agent_memory import config, keys
from agent_memory.errors import NoServer
from agent_memory.ops.running import Answers, Running, read_starts
from agent_memory.ops.terminal import Terminal, number, size
from agent_memory.stages import EXIT_INCOMPLETE
from agent_memory.store.starts import Start

EXIT_NOT_READY = 1


def status(args: argparse.Namespace) -> int:
    """0: it is ready.  1: it runs and is not.  NoServer: it does not run."""
    path, terminal = _state_dir(args), Terminal(as_json=args.json)
    key = keys.of_client(os.environ, args.api_key_file)
    running = Running.find(path)
    if running is None:
        return _nobody(path, terminal)
    answers, start = running.asked(key) if running.holder.url else {}, running.start()
    found = seen(running, answers, start)
    if terminal.as_json:
        terminal.result(found)
    else:
        terminal.table(("", ""), [(name, text) for name, text in _words(found) if text])
    return 0 if found["phase"] == "ready" and not found["reason"] else EXIT_NOT_READY


def stop(args: argparse.Namespace) -> int:
    """0: it has ended in order, or none was there.  70: it has ended otherwise.  RequestRefused: it
    is still there."""
    path, terminal = _state_dir(args), Terminal(as_json=args.json)
    running = Running.find(path)
    if running is None:
        _say(terminal, {"running": False}, f"No server is running in {path}.")
        return 0
    began, pid = time.monotonic(), running.holder.pid
    end = running.stop(args.timeout, _tell)
    took_s, clean = round(time.monotonic() - began, 2), end is not None and end.exit == 0
    how = "in order" if clean else "but not in order; its log says what went wrong"
    _say(
        terminal,
        {"running": False, "pid": pid, "clean": clean, "seconds": took_s},
        f"Process {pid} has ended after {took_s} s, {how}.",
    )
    return 0 if clean else EXIT_INCOMPLETE


def seen(running: Running, answers: Answers, start: Start | None) -> dict[str, Any]:
    """What `status --json` prints.  Bytes, seconds; null where it is not known."""
    health, ready = answers.get("/healthz", {}), answers.get("/readyz", {})
    model = (answers.get("/v1/models", {}).get("data") or [{}])[0]
    metrics, engine = answers.get("/metrics", {}), health.get("engine", {})
    agents = answers.get("/v1/agents", {}).get("data")
    trouble = health.get("status") if health.get("status") != "ok" else None
    return {
        "running": True,
        "pid": running.holder.pid,
        "started": running.holder.started,
        "state_dir": str(running.path),
        "url": running.holder.url or None,
        "answers": bool(health),
        "phase": health.get("phase") or (start.phase if start else None),
        "step": (start.step or None) if start else None,
        "reason": trouble or ready.get("reason"),
        "key_wanted": answers.get("/v1/models", {}).get("error", {}).get("message"),
        "failure": ready.get("failure"),
        "model": model.get("id"),
        "context_length": model.get("context_length"),
        "agents": None if agents is None else len(agents),
        "requests": {name: metrics.get(name) for name in ("running", "waiting")},
        "memory": {
            **{name: metrics.get(name) for name in MEMORY},
            "peak_rss_bytes": start.peak_rss_bytes if start else None,
        },
        "ages": {
            "up_s": round(time.time() - start.began, 1) if start else None,
            "last_sign_s": round(time.time() - start.last, 1) if start else None,
            "last_turn_s": engine.get("last_turn_age_s"),
        },
    }


MEMORY = ("memory_used_bytes", "memory_budget_bytes", "pool_bytes", "disk_bytes")


def _words(found: dict[str, Any]) -> list[tuple[str, str]]:
    memory, ages, requests = found["memory"], found["ages"], found["requests"]
    at = f"{found['phase']} {found['step'] or ''}".strip()
    doing = ""
    if requests["running"] is not None:
        running, waiting = (number(int(requests[name])) for name in ("running", "waiting"))
        doing = f"{running} running, {waiting} waiting"
    used = ""
    if memory["memory_used_bytes"] is not None:
        used = f"{_size(memory['memory_used_bytes'])} of {_size(memory['memory_budget_bytes'])}"
    context = f", context {number(found['context_length'])}" if found["context_length"] else ""
    return [
        ("process", f"{found['pid']}, started {found['started']}"),
        ("address", f"{found['url']}{'' if found['answers'] else ' (does not answer)'}"),
        ("phase", at if not found["reason"] else f"{at}: {found['reason']}"),
        ("why", found["failure"] or ""),
        ("key", found["key_wanted"] or ""),
        ("model", f"{found['model']}{context}" if found["model"] else ""),
        ("agents", "" if found["agents"] is None else number(found["agents"])),
        ("requests", doing),
        ("memory", used),
        ("on disk", _size(memory["disk_bytes"])),
        ("peak RSS", _size(memory["peak_rss_bytes"])),
        ("up", _seconds(ages["up_s"])),
        ("last turn", _seconds(ages["last_turn_s"], " ago")),
    ]


def _size(num_bytes: float | None) -> str:
    return "" if num_bytes is None else size(int(num_bytes))


def _seconds(seconds: float | None, after: str = "") -> str:
    return "" if seconds is None else f"{seconds:,.0f} s{after}"


def _nobody(path: Path, terminal: Terminal) -> int:
    known = read_starts(path)
    last = known[-1] if known else None
    if terminal.as_json:
        how = {"exit": last.exit, "phase": last.phase, "at": last.last} if last else None
        terminal.result({"running": False, "state_dir": str(path), "last": how})
        return NoServer.exit_code
    ended = "ended in order" if last and last.clean else f"ended badly at '{last and last.phase}'"
    more = f" The last one {ended}." if last else ""
    raise NoServer(f"No server is running in {path}.{more} Start one with 'agent-memory serve'.")


def _state_dir(args: argparse.Namespace) -> Path:
    return config.load(vars(args), os.environ, args.config).state_dir


def _tell(stage: str) -> None:
    sys.stderr.write(f"agent-memory: {stage or 'stopping'}\n")


def _say(terminal: Terminal, value: dict[str, Any], text: str) -> None:
    if terminal.as_json:
        terminal.result(value)
    else:
        terminal.say(text)
