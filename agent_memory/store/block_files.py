"""Block files written, moved aside and removed.

Knows how a file comes to be whole under its name.  Knows nothing of rows or of whether a block is
wanted.  Every failure is complained of here.  Writer thread.
"""

import errno
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from agent_memory.block import BlockHash
from agent_memory.metrics import Metrics
from agent_memory.store.complaints import Complaints, trace
from agent_memory.store.files import flush_drive, move_into, sync_folder, write_new
from agent_memory.store.format import BlockFile, encode
from agent_memory.store.jobs import WriteBlock, Written
from agent_memory.store.state_dir import StateDir

QUARANTINE_BYTES = 1 << 30
QUARANTINE_S = 30 * 24 * 3600.0

Refuses = Callable[[int], str | None]
"""Given what would be written in all, the reason why not."""


class BlockFiles:
    def __init__(self, state: StateDir, metrics: Metrics) -> None:
        self._state = state
        self._failures = Complaints("persist_failed", metrics.persist_errors)
        self._skipped = Complaints("block_not_written", metrics.writes_skipped)

    def write(self, jobs: Iterable[WriteBlock], refuses: Refuses) -> Written:
        """What is on disk under its name when this returns."""
        written: Written = {}
        num_bytes = 0
        for job in jobs:
            if job.ticket in written:
                continue
            try:
                if file := self._write_one(job, num_bytes, refuses):
                    written[job.ticket] = file
                    num_bytes += file.file_bytes
            except OSError as error:
                self.complain(error)
        self._sync_folders(written)
        if written:
            # Any file there will do but the index: closing it would drop SQLite's locks.
            flush_drive(self._state.version)
        return written

    def quarantine(self, block_hash: BlockHash) -> None:
        try:
            move_into(self._state.quarantine, self._state.block_path(block_hash))
        except FileNotFoundError:
            pass  # it was found missing
        except OSError as error:
            self.complain(error)
        self.cap_quarantine()

    def cap_quarantine(self) -> None:
        """The oldest files there go, by when they came, until the rest is small and young."""
        try:
            found = [(path.lstat(), path) for path in self._state.quarantine.iterdir()]
            newest_first = sorted(found, key=lambda item: -item[0].st_ctime)
            kept_bytes, oldest = 0, time.time() - QUARANTINE_S
            for stat, path in newest_first:
                kept_bytes += stat.st_size
                if (kept_bytes > QUARANTINE_BYTES or stat.st_ctime < oldest) and not path.is_dir():
                    path.unlink(missing_ok=True)
        except OSError as error:
            self.complain(error)

    def purge(self, hashes: Iterable[BlockHash]) -> bool:
        """What was refused of these goes from there, too: it holds what was said.  So does every
        index: it holds names, and all that could be had of it was had at the start.  Says whether
        they have gone."""
        names = {block_hash.hex() for block_hash in hashes}
        try:
            for path in self._state.quarantine.iterdir():
                is_index = path.name.startswith(self._state.index.name)
                if (is_index or path.name.partition(".")[0] in names) and not path.is_dir():
                    path.unlink(missing_ok=True)
            sync_folder(self._state.quarantine)
        except OSError as error:
            self.complain(error)
            return False
        return True

    def remove(self, hashes: Iterable[BlockHash]) -> list[BlockHash]:
        """-> those that have gone or were not there"""
        return [h for h in hashes if self._remove(self._state.block_path(h))]

    def sync(self, hashes: Iterable[BlockHash]) -> None:
        """That they have gone, or have come, is on disk when this returns.  Raises OSError."""
        for folder in {self._state.block_path(block_hash).parent for block_hash in hashes}:
            sync_folder(folder)

    def complain(self, error: Exception) -> None:
        known = isinstance(error, OSError | sqlite3.Error)
        self._failures.add(_errno_name(error), error=str(error) if known else trace(error))

    def _write_one(self, job: WriteBlock, before: int, refuses: Refuses) -> BlockFile | None:
        file, pieces = encode(job.block, job.payload, job.spec)
        if reason := refuses(before + file.file_bytes):
            self._skipped.add(reason, bytes=file.file_bytes)
            return None
        new = self._state.tmp / secrets.token_hex(8)
        try:
            write_new(new, pieces)
            new.rename(self._state.block_path(job.block.hash))
        except OSError:
            new.unlink(missing_ok=True)
            raise
        return file

    def _sync_folders(self, written: Written) -> None:
        """The names are on disk, or the blocks of that folder are not written after all."""
        paths = {ticket: self._state.block_path(ticket.block_hash) for ticket in written}
        for folder in {path.parent for path in paths.values()}:
            try:
                sync_folder(folder)
            except OSError as error:
                self.complain(error)
                for ticket, path in paths.items():
                    if path.parent == folder:
                        del written[ticket]
                        self._remove(path)

    def _remove(self, path: Path) -> bool:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self.complain(error)
            return False
        return True


def _errno_name(error: Exception) -> str:
    if isinstance(error, OSError):
        return errno.errorcode.get(error.errno or 0, "OSError")
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorname", "SQLITE_ERROR")
    return type(error).__name__
