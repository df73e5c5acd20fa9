"""Block files read again before anybody needs them, the one that was read longest ago first.

Knows how a file is found good without its model: its bytes prove which block they are, and the
catalog knows the rest.  A bad one goes the way of one found bad by a reader.  Any thread.
"""

import errno
from collections.abc import Callable
from dataclasses import dataclass

from agent_memory.block import Loss
from agent_memory.metrics import Metrics
from agent_memory.store.catalog import Catalog
from agent_memory.store.complaints import Complaints, trace
from agent_memory.store.files import read_file
from agent_memory.store.format import BlockFile, Rejected, identify
from agent_memory.store.jobs import Job, Quarantine
from agent_memory.store.state_dir import StateDir

OUR_FAULT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
"""The process is short of something; the file may be good."""


@dataclass(frozen=True, slots=True)
class Scrubbed:
    num_read: int = 0
    num_bad: int = 0


class Scrub:
    def __init__(
        self, state: StateDir, catalog: Catalog, submit: Callable[[Job], bool], metrics: Metrics
    ) -> None:
        self._state = state
        self._catalog = catalog
        self._submit = submit
        self._metrics = metrics
        self._rejected = Complaints("block_rejected", metrics.restore_rejected)

    def run(self, num_files: int, until: int | None = None) -> Scrubbed:
        """Read so many, or only those of them that were last read at the clock `until` or before.

        The clock is the catalog's.
        """
        num_read = num_bad = 0
        for file in self._catalog.longest_unread(num_files, until):
            num_read += 1
            num_bad += not self._good(file)
        self._metrics.scrubbed.inc(num_read)
        return Scrubbed(num_read, num_bad)

    def _good(self, file: BlockFile) -> bool:
        """Whether it is, as far as can be told now.  Reading is noted either way."""
        name, loss = file.block.hash.hex(), Loss.DAMAGED
        self._catalog.was_read(file)
        try:
            self._examine(file)
            return True
        except Rejected as error:
            self._rejected.add(error.reason, block=name)
        except FileNotFoundError:
            if self._catalog.file(file.block.hash) is not file:
                return True  # it was let go of meanwhile
            loss = Loss.MISSING
            self._rejected.add("missing", block=name)
        except (OSError, MemoryError) as error:
            if isinstance(error, MemoryError) or error.errno in OUR_FAULT:
                return True
            self._rejected.add("io", block=name, error=trace(error))
        self._catalog.gone.note(file.block, loss)
        # First the order, then out of sight: see store/reader.py.
        self._submit(Quarantine(file))
        self._catalog.forget_file(file)
        return False

    def _examine(self, file: BlockFile) -> None:
        path = self._state.block_path(file.block.hash)
        if path.lstat().st_size != file.file_bytes:
            raise Rejected("size")
        found = identify(read_file(path))
        if found.block != file.block:
            raise Rejected("tokens")
        if found.fingerprint != file.fingerprint:
            raise Rejected("fingerprint")
        if found.checksum != file.checksum:
            raise Rejected("checksum")
