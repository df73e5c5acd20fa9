"""F2 for what owners ask: the power goes while agents are forked, rewound, pinned, removed,
and while room is made.

What was removed never comes back, once the store has said that it is gone.
"""

from collections.abc import Callable

import pytest

from agent_memory.store.limits import Limits
from tests.faults.stories import (
    AGENT,
    EXTENTS,
    LONGER,
    SHORT,
    Alone,
    Crashes,
    Extent,
    Has,
    Head,
    LetsGo,
    Story,
    Wiped,
    told_and_cut,
)
from tests.faults.test_crash import untouched
from tests.suites import NewSuite


def remove(story: Story) -> None:
    """The only agent goes, with all it had; then somebody says the same again."""
    store, first = story.opener.open(), story.blocks(*SHORT)
    story.disk.tell(LetsGo(tuple(first)))
    assert store.remove(AGENT) == {block.hash for block in first}
    assert store.flush(10)
    story.disk.tell(Wiped(tuple(first)))
    story.put(*first[:2])
    story.record(first[:2])
    story.opener.close()


def remove_one_of_two(story: Story) -> None:
    """What another has too stays; what it alone had goes."""
    store, first, longer = story.opener.open(), story.blocks(*SHORT), story.blocks(*LONGER)
    story.put(longer[-1])
    store.record("ben", story.spec.fingerprint, longer)
    assert store.flush(10)
    story.disk.tell(LetsGo(tuple(longer[-1:])))
    store.remove("ben")
    assert store.flush(10)
    story.disk.tell(Wiped(tuple(longer[-1:])))
    story.disk.tell(Head(tuple(first)))
    story.opener.close()


def fork_and_rewind(story: Story) -> None:
    store, first = story.opener.open(), story.blocks(*SHORT)
    store.fork(AGENT, "ben")
    assert store.flush(10)
    story.disk.tell(Head(tuple(first)))
    story.disk.tell(LetsGo((first[2],)))
    store.rewind(AGENT, 300)
    store.set_pinned(AGENT, True)
    assert store.flush(10)
    story.disk.tell(Head((first[0],)))
    store.remove("ben")
    assert store.flush(10)
    story.disk.tell(Wiped((first[2],)))
    story.opener.close()


def make_room(story: Story) -> None:
    """A limit is met again and again: what is used least goes, what an agent has stays."""
    story.opener.limits = Limits(disk_bytes=260_000, min_free_bytes=0)
    store, first = story.opener.open(), story.blocks(*SHORT)
    others = [story.blocks(n, *range(200))[0] for n in range(1, 7)]
    for block in others:
        story.disk.tell(LetsGo(tuple(others)))
        story.put(block)
        story.disk.tell(Has(tuple(block for block in others if store.find(block.hash))))
    assert store.find(others[0].hash) is None
    story.disk.tell(Head(tuple(first)))
    story.opener.close()


def unfinished(story: Story) -> None:
    """Turns that never end: of the agent, and the first one of another."""
    story.opener.open()
    longer = story.blocks(*SHORT, *range(3000, 3500))
    first_turn = story.blocks(*range(5000, 5600))
    story.disk.tell(LetsGo((story.blocks(*SHORT)[2],)))  # the turn goes on from there
    story.disk.tell(Alone(AGENT, tuple(longer[2:])))
    story.disk.tell(Alone("ben", tuple(first_turn)))
    story.put(*longer[2:4], agent_id=AGENT)
    story.put(*first_turn, agent_id="ben")
    story.put(*longer[4:], agent_id=AGENT)
    story.opener.close()


STORIES = [make_room, remove, remove_one_of_two, fork_and_rewind, unfinished]


@pytest.mark.requirement("F-02", "S-24")
@pytest.mark.parametrize("extent", EXTENTS)
@pytest.mark.parametrize("what", STORIES, ids=lambda what: what.__name__)
def test_the_power_goes(
    what: Callable[[Story], None], extent: Extent, crashes: Crashes, suite: NewSuite
) -> None:
    told_and_cut(crashes, what.__name__.replace("_", " "), untouched, what, extent, suite)
