"""What is told of an agent: whose its blocks are, and how many bytes."""

import pytest

from agent_memory.block import Block
from agent_memory.engine.agent_views import AgentViews
from agent_memory.kvcache.block_pool import BlockPool
from agent_memory.store.agents import Agents
from tests.engine.test_transfer import remember
from tests.store.conftest import Opener


def test_their_bytes_are_the_agents_but_they_are_no_blocks(
    opener: Opener, blocks: list[Block], checkpoints: list[Block]
) -> None:
    store = opener.open()
    remember(opener, blocks, checkpoints)
    view = AgentViews(store, BlockPool(1 << 20)).one(store.agents.known("ann"))
    assert (view.own_blocks, view.shared_blocks, view.nbytes) == (3, 0, store.disk_bytes)
    assert (view.heads[0].num_blocks, view.heads[0].on_disk) == (3, 600)


def test_one_is_seen_without_a_look_at_all_the_others(
    monkeypatch: pytest.MonkeyPatch, opener: Opener, blocks: list[Block]
) -> None:
    store = opener.open()
    remember(opener, blocks, [])
    store.fork("ann", "eve")
    store.rewind("eve", 512)
    views = AgentViews(store, BlockPool(1 << 20))
    seen = {view.id: (view.own_blocks, view.shared_blocks) for view in views.all(None)}
    assert seen == {"ann": (1, 2), "eve": (0, 2)}
    monkeypatch.delattr(Agents, "all")
    for name, counts in seen.items():
        view = views.one(store.agents.known(name))
        assert (view.own_blocks, view.shared_blocks) == counts
