"""Which blocks are on disk and which are about to be.

Knows block files by hash and by parent, and the order in which they were last used.  Knows
nothing of how they are stored.  Memory only and quick; any thread, one lock.

A block is absent, pending or present:

    absent            --expect-->  pending     its payload waits for the writer
    pending           --settle-->  present     written and committed
    pending           --settle-->  absent      the write failed
    pending, present  --forget-->  absent      let go of, or the file is bad
    present           --evict--->  absent      a leaf that was not used since

A pending block has a ticket.  Expected again, it keeps it: the first of its writes to settle
decides for all.  Forgotten and then expected, it gets another, and a write with the old one changes
nothing.  Tickets are readings of the logical clock that also orders uses.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from threading import Lock

from agent_memory.block import Block, BlockHash
from agent_memory.store.format import BlockFile
from agent_memory.store.gone import Gone


@dataclass(frozen=True, slots=True)
class Ticket:
    """One write to come: of which expectation, and how much it holds in memory until it settles."""

    block_hash: BlockHash
    clock: int
    payload_bytes: int


class Catalog:
    """`gone`: blocks lost against everybody's wish.  Who loses one tells it why."""

    def __init__(self) -> None:
        self.gone = Gone()
        self._lock = Lock()
        # All guarded by the lock.
        self._files: dict[BlockHash, BlockFile] = {}
        self._children: dict[BlockHash, dict[BlockHash, Block]] = {}
        self._used: dict[BlockHash, int] = {}
        self._read: OrderedDict[BlockHash, int] = OrderedDict()  # longest ago first
        self._noted_reads: set[BlockHash] = set()
        self._touched: set[BlockHash] = set()
        self._pending: dict[BlockHash, tuple[BlockHash, int]] = {}  # parent and clock
        self._num_pending_children: Counter[BlockHash] = Counter()
        self._new_leaves: dict[BlockHash, None] = {}
        self._pending_bytes = 0
        self._clock = 0
        self._disk_bytes = 0

    def load(self, file: BlockFile, used: int, read: int | None = None) -> None:
        """A block found at start, when it was last used and when its file was last read.

        They come in the order of reading.
        """
        with self._lock:
            self._clock = max(self._clock, used, read or 0)
            self._add(file, used)
            self._read[file.block.hash] = used if read is None else read

    def advance(self, clock: int) -> None:
        """The clock was there already."""
        with self._lock:
            self._clock = max(self._clock, clock)

    def files(self) -> list[BlockFile]:
        with self._lock:
            return list(self._files.values())

    def file(self, block_hash: BlockHash) -> BlockFile | None:
        with self._lock:
            return self._files.get(block_hash)

    def children(self, parent: BlockHash) -> list[Block]:
        """Blocks and checkpoints after it."""
        with self._lock:
            return list(self._children.get(parent, {}).values())

    def pending(self, block_hash: BlockHash) -> bool:
        with self._lock:
            return block_hash in self._pending

    def expect(self, block: Block, payload_bytes: int) -> Ticket:
        with self._lock:
            self._clock += 1
            if block.hash not in self._pending:
                self._pending[block.hash] = block.parent, self._clock
                self._num_pending_children[block.parent] += 1
            self._pending_bytes += payload_bytes
            return Ticket(block.hash, self._pending[block.hash][1], payload_bytes)

    def wanted(self, ticket: Ticket) -> bool:
        with self._lock:
            return self._awaited(ticket) and ticket.block_hash not in self._files

    def settle(self, ticket: Ticket, file: BlockFile | None) -> bool:
        """The write is over, `file` None if nothing was written.  Says whether it is present."""
        with self._lock:
            self._pending_bytes -= ticket.payload_bytes
            if self._awaited(ticket):
                self._await_no_more(ticket.block_hash)
                if file is not None:
                    self._add(file, ticket.clock)
            return ticket.block_hash in self._files

    def forget(self, block_hash: BlockHash) -> None:
        with self._lock:
            self._forget(block_hash)

    def forget_leaf(self, block_hash: BlockHash) -> bool:
        """Says whether nothing follows it, and so it is forgotten."""
        with self._lock:
            if leaf := self._leaf(block_hash):
                self._forget(block_hash)
            return leaf

    def forget_file(self, file: BlockFile) -> bool:
        """Forget just this file, not one written later.  Says whether no later one is present."""
        with self._lock:
            if self._files.get(file.block.hash) is file:
                self._remove(file)
            return file.block.hash not in self._files

    def evict(self, block_hash: BlockHash, used: int) -> BlockFile | None:
        """Forget a block that nothing follows and that was last used just then, if it is one."""
        with self._lock:
            file = self._files.get(block_hash)
            if file is None or not self._leaf(block_hash) or self._used[block_hash] != used:
                return None
            self._remove(file)
            return file

    def used_as_leaf(self, block_hash: BlockHash) -> int | None:
        """When it was last used, if it is present and nothing follows it."""
        with self._lock:
            return self._used.get(block_hash) if self._leaf(block_hash) else None

    def leaves(self) -> list[BlockHash]:
        with self._lock:
            return [block_hash for block_hash in self._files if self._leaf(block_hash)]

    def take_new_leaves(self) -> list[BlockHash]:
        """Blocks that may have become leaves since the last call."""
        with self._lock:
            new, self._new_leaves = self._new_leaves, {}
            return list(new)

    def used_until(self, clock: int) -> list[tuple[BlockHash, int]]:
        """(hash, when) of blocks last used then or before."""
        with self._lock:
            return [(h, used) for h, used in self._used.items() if used <= clock]

    def __len__(self) -> int:
        with self._lock:
            return len(self._files)

    @property
    def clock(self) -> int:
        with self._lock:
            return self._clock

    def touch(self, hashes: Iterable[BlockHash]) -> None:
        with self._lock:
            for block_hash in hashes:
                if block_hash in self._files:
                    self._clock += 1
                    self._used[block_hash] = self._clock
                    self._touched.add(block_hash)

    def take_touched(self) -> list[tuple[BlockHash, int]]:
        """(hash, when) of blocks used since the last call."""
        with self._lock:
            touched, self._touched = self._touched, set()
            return [(block_hash, self._used[block_hash]) for block_hash in touched]

    def longest_unread(self, num_files: int, until: int | None) -> list[BlockFile]:
        """Of those last read or written at `until` or before; None: whenever that was."""
        with self._lock:
            first = islice(self._read.items(), num_files)
            return [self._files[h] for h, read in first if until is None or read <= until]

    def was_read(self, file: BlockFile) -> None:
        """Just now."""
        with self._lock:
            block_hash = file.block.hash
            if self._files.get(block_hash) is file:
                self._clock += 1
                self._read[block_hash] = self._clock
                self._read.move_to_end(block_hash)
                self._noted_reads.add(block_hash)

    def take_reads(self) -> list[tuple[BlockHash, int]]:
        """(hash, when) of files read since the last call."""
        with self._lock:
            noted, self._noted_reads = self._noted_reads, set()
            return [(block_hash, self._read[block_hash]) for block_hash in noted]

    def bytes_of(self, hashes: Iterable[BlockHash]) -> int:
        with self._lock:
            return sum(self._files[h].file_bytes for h in set(hashes) if h in self._files)

    @property
    def disk_bytes(self) -> int:
        with self._lock:
            return self._disk_bytes

    @property
    def pending_bytes(self) -> int:
        with self._lock:
            return self._pending_bytes

    def check(self) -> None:
        with self._lock:
            children = {
                (parent, block_hash): block
                for parent, siblings in self._children.items()
                for block_hash, block in siblings.items()
            }
            assert all(self._children.values())
            assert children == {(f.block.parent, h): f.block for h, f in self._files.items()}
            assert all(block_hash == file.block.hash for block_hash, file in self._files.items())
            assert self._used.keys() == self._files.keys() >= self._touched
            assert self._read.keys() == self._files.keys() >= self._noted_reads
            assert max(self._used.values(), default=0) <= self._clock
            assert max(self._read.values(), default=0) <= self._clock
            assert self._disk_bytes == sum(file.file_bytes for file in self._files.values())
            assert max((clock for _, clock in self._pending.values()), default=0) <= self._clock
            assert self._new_leaves.keys() <= self._files.keys()
            assert self._num_pending_children == Counter(p for p, _ in self._pending.values())
            assert self._pending_bytes >= 0
        self.gone.check()

    def _leaf(self, block_hash: BlockHash) -> bool:
        return block_hash not in self._children and not self._num_pending_children[block_hash]

    def _may_be_leaf(self, block_hash: BlockHash) -> None:
        if block_hash in self._files:
            self._new_leaves[block_hash] = None

    def _awaited(self, ticket: Ticket) -> bool:
        pending = self._pending.get(ticket.block_hash)
        return pending is not None and pending[1] == ticket.clock

    def _await_no_more(self, block_hash: BlockHash) -> None:
        parent, _ = self._pending.pop(block_hash)
        self._num_pending_children[parent] -= 1
        if not self._num_pending_children[parent]:
            del self._num_pending_children[parent]
            self._may_be_leaf(parent)

    def _forget(self, block_hash: BlockHash) -> None:
        if block_hash in self._pending:
            self._await_no_more(block_hash)
        if file := self._files.get(block_hash):
            self._remove(file)

    def _add(self, file: BlockFile, used: int) -> None:
        block = file.block
        assert block.hash not in self._files
        self._files[block.hash] = file
        self._children.setdefault(block.parent, {})[block.hash] = block
        self._used[block.hash] = self._read[block.hash] = used
        self._may_be_leaf(block.hash)
        self._disk_bytes += file.file_bytes

    def _remove(self, file: BlockFile) -> None:
        block = file.block
        del self._files[block.hash], self._used[block.hash], self._read[block.hash]
        self._noted_reads.discard(block.hash)
        self._touched.discard(block.hash)
        siblings = self._children[block.parent]
        del siblings[block.hash]
        if not siblings:
            del self._children[block.parent]
            self._may_be_leaf(block.parent)
        self._new_leaves.pop(block.hash, None)
        self._disk_bytes -= file.file_bytes
