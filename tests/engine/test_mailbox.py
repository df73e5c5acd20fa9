"""A request's events on the loop's side: few are held, no text is lost."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_memory.engine.mailbox import MAX_EVENTS, Mailbox, Stream
from agent_memory.errors import EngineFailed
from agent_memory.request import Delta, Failed, Finished, FinishReason, TokenLogprob


async def read(stream: Stream) -> tuple[str, int, int]:
    """-> text, tokens and number of deltas up to the end."""
    text, num_tokens, count = "", 0, 0
    while not isinstance(event := await stream.get(), Finished):
        if isinstance(event, Delta):
            text, num_tokens, count = text + event.text, event.num_tokens, count + 1
    return text, num_tokens, count


@given(st.lists(st.text(max_size=3), max_size=300))
def test_an_unread_stream_is_bounded_and_whole(pieces: list[str]) -> None:
    stream = Stream()
    for n, piece in enumerate(pieces):
        stream.put(Delta(piece, n + 1))
    stream.put(Finished(FinishReason.STOP, len(pieces)))
    assert len(stream) <= MAX_EVENTS + 1
    text, num_tokens, count = asyncio.run(read(stream))
    assert (text, num_tokens) == ("".join(pieces), len(pieces))
    assert count == min(len(pieces), MAX_EVENTS)


async def test_a_reader_that_is_there_gets_each() -> None:
    stream = Stream()
    reading = asyncio.create_task(read(stream))
    for n in range(3 * MAX_EVENTS):
        stream.put(Delta("x", n + 1))
        await asyncio.sleep(0)
    stream.put(Finished(FinishReason.STOP, n + 1))
    assert await reading == ("x" * 3 * MAX_EVENTS, 3 * MAX_EVENTS, 3 * MAX_EVENTS)


async def test_a_reader_that_left_takes_nothing_with_it() -> None:
    stream = Stream()
    reading = asyncio.create_task(stream.get())
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.wait({reading})
    stream.put(Delta("x", 1))
    assert await stream.get() == Delta("x", 1)


async def test_logprobs_are_joined_as_the_text_is() -> None:
    stream, num_tokens = Stream(), 3 * MAX_EVENTS
    for n in range(num_tokens):
        stream.put(Delta("", n + 1, (TokenLogprob(n, -1.0),)))
    told = [event for _ in range(MAX_EVENTS) if isinstance(event := await stream.get(), Delta)]
    assert [one.token for delta in told for one in delta.logprobs] == list(range(num_tokens))


async def test_when_nobody_takes_commands_any_more_all_who_wait_are_told() -> None:
    mailbox, error = Mailbox(), EngineFailed("lost")
    stream, called = mailbox.stream(), mailbox.call(lambda: 1)
    mailbox.give_up(error)
    assert await stream.get() == Failed(error)
    assert called.exception() is error
    assert await mailbox.stream().get() == Failed(error)
    with pytest.raises(EngineFailed, match="lost"):
        mailbox.call(lambda: 1).result(0)
    late = mailbox.take(wait=False)  # the thread was not dead after all
    assert late is not None
    late()
    assert called.exception() is error


async def test_one_who_was_answered_is_left_in_peace() -> None:
    mailbox = Mailbox()
    called = mailbox.call(lambda: 1)
    command = mailbox.take(wait=False)
    assert command is not None
    command()
    mailbox.give_up(EngineFailed("lost"))
    assert called.result(0) == 1
