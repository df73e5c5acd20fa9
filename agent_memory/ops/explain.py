"""The command `explain`: why a request was a miss, asked of a running server.

Knows how an explanation looks to people.  Main thread.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx

from agent_memory.errors import NoServer, RequestRefused, UsageError

CONNECT_S = 5.0
ANSWER_S = 60.0


def main(args: argparse.Namespace) -> int:
    """Raises NoServer if nobody answers, RequestRefused if the server says no."""
    explained = ask(args.url, args.request_id)
    if args.json:
        text = json.dumps(explained, indent=2, ensure_ascii=False)
    else:
        text = "\n".join(lines(explained))
    sys.stdout.write(text + "\n")
    return 0


def ask(url: str, request_id: str) -> dict[str, Any]:
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"--url: {url!r} must begin with http://.")
    path = f"{url.rstrip('/')}/v1/requests/{quote(request_id, safe='')}/explain"
    limits = httpx.Timeout(ANSWER_S, connect=CONNECT_S)
    try:
        answer = httpx.get(path, timeout=limits, trust_env=False)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise NoServer(
            f"No server answers at {url} ({error}). Start one with 'agent-memory serve', or name "
            "the right one with --url."
        ) from error
    try:
        body = answer.json()
        if answer.is_success and body["object"] == "request.explanation":
            explained: dict[str, Any] = body
            return explained
        message = str(body["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"{url} said {answer.status_code}, and nothing of ours: is it the right server?"
    raise RequestRefused(message)


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
