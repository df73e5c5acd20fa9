"""Several streams at one server, in the ways they may arrive.

Knows no server but by its streams.  Main thread.
"""

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import NamedTuple

from agent_memory.bench.models import Model
from agent_memory.bench.servers import Server
from agent_memory.bench.streams import Stream, gaps_during
from agent_memory.errors import ServerFailed

BEGUN = 8
"""Tokens of a stream until the next of staggered ones is sent."""
RUNNING = 20
"""The same of each that runs, until the long prompt is sent."""
ENDLESS = 1500
"""More tokens than such a stream gets until it is broken off."""


def at_once(
    server: Server, agent: str, prompts: Sequence[str], max_tokens: int, model: Model
) -> list[Stream]:
    """Whole answers, each to an agent of its own, and then a rest."""
    with ExitStack() as stack:
        streams = [
            stack.enter_context(server.stream(f"{agent}-{i}", prompt, max_tokens, model))
            for i, prompt in enumerate(prompts)
        ]
        for stream in streams:
            _whole(stream, model)
    server.rest()
    return streams


def staggered(
    server: Server, agent: str, prompts: Sequence[str], max_tokens: int, model: Model
) -> list[Stream]:
    streams: list[Stream] = []
    with ExitStack() as stack:
        for i, prompt in enumerate(prompts):
            for stream in streams[-1:]:
                _begun(stream, BEGUN)
            stream = server.stream(f"{agent}-{i}", prompt, max_tokens, model)
            streams.append(stack.enter_context(stream))
        for stream in streams:
            _whole(stream, model)
    server.rest()
    return streams


class Landed(NamedTuple):
    """`gaps`: of those that ran, from when the long prompt was sent to its first token."""

    arriving: Stream
    running: list[Stream]
    gaps: list[float]


def landing(
    server: Server, agent: str, running: Sequence[str], prompt: str, model: Model
) -> Landed:
    """`running`: prompts of those that are answered meanwhile, and then broken off; and a rest."""
    with ExitStack() as stack:
        streams = [
            stack.enter_context(server.stream(f"{agent}-runs-{i}", text, ENDLESS, model))
            for i, text in enumerate(running)
        ]
        for stream in streams:
            _begun(stream, RUNNING)
        arriving = stack.enter_context(server.stream(agent, prompt, 1, model)).wait()
        for stream in streams:
            _begun(stream, len(stream.moments) + 1)
    server.rest()
    until = arriving.moments[0]
    gaps = [gap for s in streams for gap in gaps_during(s.moments, arriving.sent, until)]
    return Landed(arriving, streams, gaps)


def _begun(stream: Stream, num_tokens: int) -> None:
    """So many tokens came, or all there will be."""
    with suppress(RuntimeError):
        stream.wait_for(num_tokens)


def _whole(stream: Stream, model: Model) -> None:
    """Raises ServerFailed if its tokens cannot be counted by their texts."""
    stream.wait()
    told = stream.usage.get("completion_tokens")
    if model.endless and told is not None and told != len(stream.moments):
        raise ServerFailed(f"{told} tokens came in {len(stream.moments)} pieces.")
