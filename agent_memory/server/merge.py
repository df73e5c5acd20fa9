"""Several streams of events as one, in the order they come.  Event loop."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _End:
    error: Exception | None = None


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Closing it closes all; the first error ends all and is raised."""
    if len(streams) == 1:  # needs no tasks
        async with aclosing(streams[0]) as stream:
            async for only in stream:
                yield only
        return
    items = asyncio.Queue[T | _End](len(streams))  # who does not read holds the rest up
    tasks = [asyncio.create_task(_pass_on(stream, items)) for stream in streams]
    try:
        running = len(tasks)
        while running:
            item = await items.get()
            if not isinstance(item, _End):
                yield item
            elif item.error is not None:
                raise item.error
            else:
                running -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _pass_on(stream: AsyncGenerator[T, None], items: "asyncio.Queue[T | _End]") -> None:
    end = _End()
    try:
        async with aclosing(stream):
            async for item in stream:
                await items.put(item)
    except Exception as error:
        end = _End(error)
    await items.put(end)
