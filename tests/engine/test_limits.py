"""How many requests may wait or run, of each tenant and of all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_memory.engine.limits import Queue
from agent_memory.errors import Unavailable

NAMES = (None, "acme", "zoo")


def fill(queue: Queue, tenant: str | None) -> int:
    """How many more there is a place for."""
    count = 0
    while not queue.is_full(tenant):
        queue.enter(tenant)
        count += 1
    return count


@pytest.mark.parametrize("most", [1, 2, 7])
def test_who_is_alone_has_all_places(most: int) -> None:
    queue = Queue(most)
    assert fill(queue, None) == most == queue.num_active
    with pytest.raises(Unavailable, match=f"{most} requests"):
        queue.enter(None)
    queue.leave(None, 1.0)
    assert fill(queue, None) == 1


@pytest.mark.requirement("S-11")
@pytest.mark.parametrize(("most", "own", "common"), [(12, 2, 6), (6, 1, 3), (13, 2, 7)])
def test_whoever_takes_what_he_can_leaves_the_others_theirs(
    most: int, own: int, common: int
) -> None:
    queue = Queue(most, len(NAMES))
    assert [fill(queue, name) for name in NAMES] == [own + common, own, own]
    assert queue.num_active == most
    queue.leave("acme", 1.0)
    assert queue.is_full(None) and queue.is_full("zoo") and fill(queue, "acme") == 1
    queue.leave(None, 1.0)
    assert fill(queue, "zoo") == 1


@pytest.mark.requirement("S-11")
@given(st.integers(6, 40), st.lists(st.tuples(st.sampled_from(NAMES), st.booleans())))
def test_every_tenant_can_always_have_its_own(
    most: int, moves: list[tuple[str | None, bool]]
) -> None:
    queue, inside = Queue(most, len(NAMES)), dict.fromkeys(NAMES, 0)
    for name, comes in moves:
        if comes and not queue.is_full(name):
            queue.enter(name)
            inside[name] += 1
        elif not comes and inside[name]:
            queue.leave(name, 0.1)
            inside[name] -= 1
        assert queue.num_active == sum(inside.values()) <= most
        for other in NAMES:
            assert inside[other] >= most // 6 or not queue.is_full(other)
