"""What the writer is asked to do, and which rows that changes.

Values only, any thread.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from threading import Event

from agent_memory.block import Block, BlockHash
from agent_memory.kv_spec import KVSpec
from agent_memory.store import index as rows
from agent_memory.store.agents import Agent
from agent_memory.store.catalog import Ticket
from agent_memory.store.files import Bytes
from agent_memory.store.format import BlockFile
from agent_memory.store.index import Statement

OnWritten = Callable[[BlockHash, bool], None]


@dataclass(frozen=True, slots=True, eq=False)
class WriteBlock:
    """`on_written(hash, present)` is called once, on the writer thread, whatever happens."""

    block: Block
    payload: Bytes
    spec: KVSpec
    ticket: Ticket
    on_written: OnWritten
    agent_id: str | None = None


@dataclass(frozen=True, slots=True)
class SaveAgent:
    """As it was when this was asked for.  `let_go`: as for DeleteBlocks."""

    agent: Agent
    let_go: tuple[BlockHash, ...] = ()


@dataclass(frozen=True, slots=True)
class RemoveAgent:
    """`wipe`: and leave no trace of it or of `let_go`."""

    agent_id: str
    let_go: tuple[BlockHash, ...] = ()
    wipe: bool = False


@dataclass(frozen=True, slots=True)
class DeleteBlocks:
    """The catalog has forgotten them already."""

    let_go: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True)
class Quarantine:
    file: BlockFile


@dataclass(frozen=True, slots=True)
class Barrier:
    """`reached` is set when everything submitted before is settled."""

    reached: Event
    last: bool = False


Job = WriteBlock | SaveAgent | RemoveAgent | DeleteBlocks | Quarantine | Barrier
Written = dict[Ticket, BlockFile]


def names(jobs: Iterable[WriteBlock]) -> list[Statement]:
    """Whose the blocks are."""
    return [rows.write_for(job.block.hash, job.agent_id) for job in jobs if job.agent_id]


def changes(
    batch: Iterable[Job], written: Mapping[Ticket, BlockFile]
) -> tuple[list[Statement], set[BlockHash]]:
    """The rows to change, in the order of the queue, and the blocks whose files are to go."""
    statements: list[Statement] = []
    doomed: set[BlockHash] = set()
    for job in batch:
        match job:
            case WriteBlock() if file := written.get(job.ticket):
                statements.append(rows.put_block(file, job.ticket.clock))
                statements.append(rows.drop_doomed(job.block.hash))
                statements += names([job])
                doomed.discard(job.block.hash)
            case SaveAgent():
                statements += rows.put_agent(job.agent)
            case RemoveAgent():
                statements += rows.drop_agent(job.agent_id)
            case _:
                pass
        if isinstance(job, SaveAgent | RemoveAgent | DeleteBlocks):
            for block_hash in job.let_go:
                statements += rows.doom_block(block_hash)
            doomed.update(job.let_go)
    return statements, doomed


def still_owed(batch: Iterable[Job]) -> list[Job]:
    """Of a batch that could not be committed, what must be tried again: the last word on each
    agent, and the blocks that nobody may find again."""
    agents: dict[str, Job] = {}
    let_go: dict[BlockHash, None] = {}
    for job in batch:
        match job:
            case SaveAgent():
                agents[job.agent.id] = SaveAgent(job.agent)
            case RemoveAgent():
                agents[job.agent_id] = RemoveAgent(job.agent_id, wipe=job.wipe)
            case _:
                pass
        if isinstance(job, SaveAgent | RemoveAgent | DeleteBlocks):
            let_go.update(dict.fromkeys(job.let_go))
    deleted = [DeleteBlocks(tuple(let_go))] if let_go else []
    return [*agents.values(), *deleted]
