"""Results as a run leaves them, of figures made up: what becomes of them is what is tested."""

from collections.abc import Callable, Mapping
from typing import Any

from agent_memory.bench.measured import At, Notes
from agent_memory.bench.servers import OURS

THEIRS = ("mlx_lm.server 2048", "mlx_lm.server 256")

Filled = Callable[[Notes], None]


def results(parts: Mapping[str, Filled], **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "format": 1,
        "mode": "normal",
        "date": "2026-11-21T20:00:00+00:00",
        "machine": {
            "system": "Darwin 25.1.0 arm64",
            "chip": "Apple M4",
            "cores": 10,
            "memory_bytes": 24 << 30,
            "disk": None,
            "backend": "metal",
            "blas": None,
            "python": "3.12.1",
            "versions": {"agent-memory": "0.1.0", "mlx": "0.32.4"},
            "commit": "0123456789ab",
        },
        "models": ["builtin", "random"],
        "servers": [OURS, *THEIRS],
        **changes,
    }
    for name, fill in parts.items():
        notes = Notes()
        fill(notes)
        measured = [one.as_json() for one in notes]
        found[name] = {"title": f"About {name}", "seconds": 3.0, "measured": measured}
    found["seconds"] = 61.5
    return found


def add(notes: Notes, name: str, at: At, unit: str, *rounds: tuple[float, ...]) -> None:
    """`rounds`: ours, then theirs."""
    for values in rounds:
        for server, value in zip((OURS, *THEIRS), values, strict=False):
            notes.add(name, at, unit, server, value, more_is_better=unit.startswith("tokens"))


def switch(notes: Notes) -> None:
    for kind in ("restart", "hot"):
        at = {"switch": kind, "to": "builtin"}
        add(notes, "stop", at, "s", (0.5, 0.1, 0.2), (0.6, 0.1, 0.2), (0.4, 0.1, 0.2))
        add(notes, "back at work", at, "s", (2, 9, 8), (2.2, 10, 8), (1.8, 10, 8))
        add(notes, "tokens restored", at, "tokens", (1500, 0, 0), (1500, 0, 0), (1500, 0, 0))
    notes.limit("back at work", at, 1.1)
    add(notes, "stop", {"stage": "persist"}, "s", (0.25,), (0.35,), (0.3,))


def ttft(notes: Notes) -> None:
    for tokens in (512, 2048):
        for state, prompt, ours, other in (
            ("RAM", "cold", 400, 390),
            ("RAM", "identical", 20, 30),
            ("restart", "identical", 30, 390),
            ("restart", "one more turn", 40, 395),
        ):
            at: At = {"state": state, "prompt": prompt, "tokens": tokens}
            both = [x * tokens / 512 for x in (ours, other)]
            add(notes, "first token", at, "ms", (*both, both[1]))
            notes.limit("first token", at, 0.9 * both[0])


def concurrency(notes: Notes) -> None:
    for streams in (1, 4, 8):
        at: At = {"arrival": "equal", "streams": streams}
        add(notes, "all tokens", at, "tokens/s", (30.0 * streams**0.5, 31.0 * streams**0.6, 20))
        notes.limit("all tokens", at, 35.0 * streams**0.7)


def memory(notes: Notes) -> None:
    for bits in ("8", "4", "none"):
        add(notes, "RAM per token", {"kv_bits": bits}, "bytes", (1088, 4300))
        add(notes, "disk per token", {"kv_bits": bits}, "bytes", (1100,))


def growth(notes: Notes) -> None:
    for agents in (10, 100, 1000):
        add(notes, "list of agents", {"agents": agents}, "ms", (2.0 + agents / 100,))


ALL: dict[str, Filled] = {
    "growth": growth,
    "memory": memory,
    "concurrency": concurrency,
    "ttft": ttft,
    "switch": switch,
}
