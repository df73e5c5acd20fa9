"""A state directory seen from outside: who and what is in it, and whether its files are good.

Reads only and takes no lock, so a server may be at work there meanwhile: what goes while it is
looked at is not missing, what comes is not strange.  Any thread.
"""

import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from agent_memory.block import BlockHash
from agent_memory.errors import StateDirError
from agent_memory.store.agents import Agent, Agents
from agent_memory.store.catalog import Catalog
from agent_memory.store.files import read_file
from agent_memory.store.format import BlockFile, Rejected, identify
from agent_memory.store.index import Index
from agent_memory.store.recover import VERSION, block_files, load_agents, read_rows
from agent_memory.store.state_dir import StateDir
from agent_memory.store.unfinished import take_over


@dataclass(frozen=True, slots=True)
class Amount:
    count: int = 0
    nbytes: int = 0

    def plus(self, nbytes: int) -> "Amount":
        return Amount(self.count + 1, self.nbytes + nbytes)


@dataclass(frozen=True, slots=True)
class AgentSeen:
    """`own`: files that no other agent has in mind; `shared`: the others."""

    agent: Agent
    own: Amount
    shared: Amount


@dataclass(frozen=True, slots=True)
class Seen:
    """`blocks`: files, also of checkpoints.  `models`: those by fingerprint.  `unowned`: of no
    agent.  `set_aside`: whole stores of other versions."""

    agents: list[AgentSeen]
    blocks: Amount
    unowned: Amount
    models: dict[BlockHash, Amount]
    quarantine: Amount
    set_aside: dict[str, Amount]


@dataclass(slots=True)
class Verified:
    """`bad`: (file, reason), and blocks in the index whose file is not there.  `new`: good files
    that the index does not know yet."""

    good: Amount = Amount()
    new: int = 0
    bad: list[tuple[Path, str]] = field(default_factory=list)


def look(state: StateDir) -> Seen:
    """What the index says.  Raises StateDirError."""
    catalog, agents = _read(state)
    everybody = agents.all()
    owned = {agent.id: agent.owned() for agent in everybody}
    num_owners = Counter(block_hash for hashes in owned.values() for block_hash in hashes)
    blocks, unowned, models = Amount(), Amount(), dict[BlockHash, Amount]()
    for file in catalog.files():
        blocks = blocks.plus(file.file_bytes)
        models[file.fingerprint] = models.get(file.fingerprint, Amount()).plus(file.file_bytes)
        if file.block.hash not in num_owners:
            unowned = unowned.plus(file.file_bytes)
    return Seen(
        agents=[_seen(agent, owned[agent.id], num_owners, catalog) for agent in everybody],
        blocks=blocks,
        unowned=unowned,
        models=models,
        quarantine=contents(state.quarantine),
        set_aside={path.name: contents(path) for path in sorted(state.path.glob("set-aside-*"))},
    )


def _seen(
    agent: Agent, hashes: set[BlockHash], num_owners: "Counter[BlockHash]", catalog: Catalog
) -> AgentSeen:
    own, shared = Amount(), Amount()
    for block_hash in hashes:
        if file := catalog.file(block_hash):
            if num_owners[block_hash] == 1:
                own = own.plus(file.file_bytes)
            else:
                shared = shared.plus(file.file_bytes)
    return AgentSeen(agent, own, shared)


def verify(state: StateDir, advance: Callable[[int, int], object]) -> Verified:
    """Read every block file; `advance(done, of)` after each.  Raises StateDirError."""
    catalog, _ = _read(state)
    names = dict(block_files(state))
    result = Verified()
    for done, block_hash in enumerate(names, 1):
        _verify_file(state, block_hash, catalog.file(block_hash), result)
        advance(done, len(names))
    gone = [file for file in catalog.files() if file.block.hash not in names]
    still_listed = {file.block.hash for file in _read(state)[0].files()} if gone else set()
    for file in gone:
        path = state.block_path(file.block.hash)
        if file.block.hash in still_listed and not os.path.lexists(path):
            result.bad.append((path, "missing"))
    return result


def _verify_file(
    state: StateDir, block_hash: BlockHash, expected: BlockFile | None, result: Verified
) -> None:
    path = state.block_path(block_hash)
    try:
        found = identify(read_file(path))
        if found.block.hash != block_hash:
            raise Rejected("tokens")
        if expected is not None and found != expected:
            raise Rejected("checksum")
    except FileNotFoundError:
        return  # the server has deleted it meanwhile
    except Rejected as error:
        if os.path.lexists(path):
            result.bad.append((path, error.reason))
    except OSError as error:
        result.bad.append((path, f"io: {error.strerror}"))
    else:
        result.good = result.good.plus(found.file_bytes)
        result.new += expected is None


def contents(folder: Path) -> Amount:
    """Of every file below."""
    amount = Amount()
    for size in _sizes(folder):
        amount = amount.plus(size)
    return amount


def _sizes(folder: Path) -> Iterator[int]:
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                yield os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue


def _read(state: StateDir) -> tuple[Catalog, Agents]:
    try:
        version = state.version.read_bytes()
    except OSError as error:
        raise StateDirError(
            f"There is no store in {state.path}. Name the right one with --state-dir."
        ) from error
    if version != VERSION:
        raise StateDirError(
            f"{state.path} holds a store of version {version.decode('ascii', 'replace').strip()}, "
            f"this program knows {VERSION.decode().strip()}. A server that is started there sets "
            "it aside and begins anew."
        )
    try:
        index = Index.read_only(state.index)
        try:
            found, catalog = read_rows(index), Catalog()
            for row in found.blocks.values():
                catalog.load(*row)
            agents = load_agents(catalog, found)
            take_over(agents, catalog, found.written_for)
            return catalog, agents
        finally:
            index.close()
    except (sqlite3.Error, OSError, TypeError, ValueError) as error:
        raise StateDirError(
            f"The index in {state.path} cannot be read: {error}. Stop the server, if one is at "
            "work there, and run 'agent-memory store rebuild'."
        ) from error
