"""The SQLite index: a row per block file, a row per agent's head.

Knows the tables and how to change them in one transaction.  Losing it loses no block: it is rebuilt
from the files.  One thread at a time: the one that opens the store, then the writer.
"""

import os
import sqlite3
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from agent_memory.block import BLOCK_TOKENS, HASH_BYTES, Block, BlockHash
from agent_memory.store.agents import Head
from agent_memory.store.format import BlockFile

Statement = tuple[str, tuple[bytes | str | int | float, ...]]

_BUSY_S = 0.25  # nobody else writes here, unless a person looks with a tool of theirs
_TOKENS_BYTES = range(4, 4 * BLOCK_TOKENS + 1, 4)
_TABLES = """
CREATE TABLE IF NOT EXISTS blocks (
    hash BLOB PRIMARY KEY, parent BLOB NOT NULL, fingerprint BLOB NOT NULL, tokens BLOB NOT NULL,
    file_bytes INTEGER NOT NULL, checksum BLOB NOT NULL, used INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS heads (
    ordinal INTEGER PRIMARY KEY, agent TEXT NOT NULL, fingerprint BLOB NOT NULL,
    chain BLOB NOT NULL, num_tokens INTEGER NOT NULL, last_used REAL NOT NULL
) STRICT;
"""


@dataclass(frozen=True, slots=True)
class HeadRow:
    agent: str
    fingerprint: BlockHash
    chain: tuple[BlockHash, ...]
    last_used: float


class Index:
    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    @classmethod
    def open(cls, path: Path) -> "Index":
        """Raises sqlite3.DatabaseError if it is damaged, OSError if it cannot be reached."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        os.close(os.open(path, flags, 0o600))  # SQLite gives its -wal and -shm the same mode
        db = sqlite3.connect(path, timeout=_BUSY_S, check_same_thread=False)
        try:
            _configure(db)
        except BaseException:
            db.close()
            raise
        return cls(db)

    def blocks(self) -> Iterator[tuple[BlockFile, int]]:
        """(file, when used) of every row whose hash is the hash of its tokens."""
        columns = "hash, parent, tokens, fingerprint, file_bytes, checksum, used"
        for row in self._db.execute(f"SELECT {columns} FROM blocks"):
            block_hash, parent, tokens, *rest, used = row
            if len(parent) != HASH_BYTES or len(tokens) not in _TOKENS_BYTES:
                continue
            block = Block.of(parent, tokens)
            if block.hash == block_hash:
                yield BlockFile(block, *rest), used

    def heads(self) -> Iterator[HeadRow]:
        """Oldest first."""
        columns = "agent, fingerprint, chain, last_used"
        for row in self._db.execute(f"SELECT {columns} FROM heads ORDER BY ordinal"):
            agent, fingerprint, chain, last_used = row
            hashes = [chain[at : at + HASH_BYTES] for at in range(0, len(chain), HASH_BYTES)]
            yield HeadRow(agent, fingerprint, tuple(hashes), last_used)

    def commit(self, statements: Iterable[Statement]) -> None:
        """All of them, in order, on disk when this returns; or none.  Raises sqlite3.Error."""
        with self._db:
            for sql, values in statements:
                self._db.execute(sql, values)

    def close(self) -> None:
        self._db.close()


def put_block(file: BlockFile, used: int) -> Statement:
    block = file.block
    row = (block.hash, block.parent, file.fingerprint, block.tokens)
    sql = "INSERT OR REPLACE INTO blocks VALUES (?, ?, ?, ?, ?, ?, ?)"
    return sql, (*row, file.file_bytes, file.checksum, used)


def set_used(block_hash: BlockHash, used: int) -> Statement:
    return "UPDATE blocks SET used = ? WHERE hash = ?", (used, block_hash)


def drop_block(block_hash: BlockHash) -> Statement:
    return "DELETE FROM blocks WHERE hash = ?", (block_hash,)


def put_head(agent: str, head: Head) -> Statement:
    chain = b"".join(block.hash for block in head.chain)
    row = (head.ordinal, agent, head.fingerprint, chain, head.num_tokens, head.last_used)
    return "INSERT OR REPLACE INTO heads VALUES (?, ?, ?, ?, ?, ?)", row


def drop_head(ordinal: int) -> Statement:
    return "DELETE FROM heads WHERE ordinal = ?", (ordinal,)


def drop_all_heads() -> Statement:
    return "DELETE FROM heads", ()


def _configure(db: sqlite3.Connection) -> None:
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    if sys.platform == "darwin":
        db.execute("PRAGMA fullfsync = 1")
        db.execute("PRAGMA checkpoint_fullfsync = 1")
    [answer] = db.execute("PRAGMA quick_check(1)").fetchone()
    if answer != "ok":
        raise sqlite3.DatabaseError(answer)
    db.executescript(_TABLES)
