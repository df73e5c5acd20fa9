"""Turns that a crash cut short: what was written for an agent and is in none of its heads.

Knows that the agent has it in mind as far as it came, as after any turn that ends early, so that it
goes with the agent.  Memory only; the thread that opens the store.
"""

import time
from collections.abc import Iterable

from agent_memory.block import Block, BlockHash, root_of
from agent_memory.store.agents import Agents
from agent_memory.store.catalog import Catalog
from agent_memory.store.format import BlockFile
from agent_memory.store.heads import Chain
from agent_memory.tenants import tenant_of

_Files = dict[BlockHash, BlockFile]


def take_over(
    agents: Agents, catalog: Catalog, written_for: Iterable[tuple[BlockHash, str]]
) -> set[BlockHash]:
    """Make it heads.  -> what is of no use: nobody has it in mind then, and nothing follows it.
    The catalog has forgotten that."""
    found = dict[str, _Files]()
    for block_hash, agent_id in written_for:
        if file := catalog.file(block_hash):
            found.setdefault(agent_id, {})[block_hash] = file
    offered = dict[BlockHash, Block]()
    for agent_id, files in found.items():
        for chain in _take_over(agents, catalog, agent_id, files):
            offered |= {block.hash: block for block in chain}
    loose = {h: block for h, block in offered.items() if not agents.owns(h)}
    return _forget(catalog, loose)


def _take_over(agents: Agents, catalog: Catalog, agent_id: str, files: _Files) -> list[Chain]:
    """-> what may be nobody's now"""
    agent = agents.get(agent_id)
    owned = agent.owned() if agent else set()
    new = {h: file for h, file in files.items() if h not in owned}
    offered: list[Chain] = [(file.block,) for file in new.values()]
    checkpoints = tuple(file.block for file in new.values() if file.block.is_checkpoint)
    if agent:
        checkpoints += tuple(point for head in agent.heads for point in head.checkpoints)
    followed = {file.block.parent for file in new.values() if not file.block.is_checkpoint}
    for block_hash, file in new.items():
        if file.block.is_checkpoint or block_hash in followed:
            continue
        chain = _chain(catalog, file.block, root_of(file.fingerprint, tenant_of(agent_id)))
        if not chain:
            continue
        if agents.get(agent_id) is None:
            agents.credit(agent_id, sum(file.file_bytes for file in files.values()))
        changed = agents.record(
            agent_id, file.fingerprint, chain, time.time(), checkpoints=checkpoints
        )
        offered += changed.loose
    return offered


def _chain(catalog: Catalog, end: Block, root: BlockHash) -> Chain:
    """All of it to `end`; nothing if a block before is missing."""
    chain = [end]
    while chain[-1].parent != root:
        file = catalog.file(chain[-1].parent)
        if file is None or not file.block.full:
            return ()
        chain.append(file.block)
    return tuple(reversed(chain))


def _forget(catalog: Catalog, loose: dict[BlockHash, Block]) -> set[BlockHash]:
    """Those that nothing follows, and so what only they followed."""
    gone = set[BlockHash]()
    for block in list(loose.values()):
        last: Block | None = block
        while last and last.hash not in gone and catalog.forget_leaf(last.hash):
            gone.add(last.hash)
            last = loose.get(last.parent)
    return gone
