"""The command `explain`: why a request was a miss, asked of a running server.

Knows how an explanation looks to people.  Main thread.
"""

import argparse
from collections.abc import Iterator
from typing import Any

from agent_memory.ops.agent_client import AgentClient
from agent_memory.ops.terminal import Terminal


def main(args: argparse.Namespace) -> int:
    """Raises StartError."""
    terminal = Terminal(as_json=args.json)
    with AgentClient.named(args) as client:
        explained = client.explanation(args.request_id)
    if terminal.as_json:
        terminal.result(explained)
    else:
        for line in lines(explained):
            terminal.say(line)
    return 0


def lines(explained: dict[str, Any]) -> Iterator[str]:
    tokens = explained["tokens"]
    whose = f"of {explained['agent']}" if explained["agent"] else "of nobody by name"
    yield f"{explained['id']} {whose}: {explained['cause']}"
    yield f"  {explained['meaning']}"
    yield (
        f"  {tokens['cached']:,} of {tokens['prompt']:,} tokens from memory: {tokens['memory']:,} "
        f"RAM, {tokens['disk']:,} disk, in {explained['restore_ms']:.1f} ms"
    )
    if explained["lost"]:
        yield f"  lost: {explained['lost']}"
    if differs := explained["differs"]:
        yield from _place(differs)


def _place(differs: dict[str, Any]) -> Iterator[str]:
    """Texts are quoted, so that line ends and the like can be seen and do no harm."""
    where = f"  from token {differs['token']:,} on"
    if differs["field"]:
        where += f", {differs['field']} at character {differs['character']:,}"
    yield where + ":"
    for name, key in (("before", "before"), ("now", "prompt"), ("remembered", "remembered")):
        if differs[key] is not None:
            yield f"    {name:<11}{differs[key]!r}"
