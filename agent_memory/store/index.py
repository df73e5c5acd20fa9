"""The SQLite index: rows of block files, of heads and their agents, and of files that must go.

Knows the tables and how to change them in one transaction.  Losing it loses no block: it is rebuilt
from the files.  One thread at a time: the one that opens the store, then the writer.
"""

import os
import sqlite3
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agent_memory.block import BLOCK_TOKENS, HASH_BYTES, Block, BlockHash
from agent_memory.store.agents import Agent
from agent_memory.store.format import BlockFile
from agent_memory.store.heads import Head, Turn

Statement = tuple[str, tuple[bytes | str | int | float, ...]]

_BUSY_S = 0.25  # nobody else writes here, unless a person looks with a tool of theirs
_LOOK_BUSY_S = 5.0
_TOKENS_BYTES = range(0, 4 * BLOCK_TOKENS + 1, 4)
_NOT_THE_FILES = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
}
_CLOCKS = range(1 << 62)
_OF_AGENTS = ("heads", "agents", "written_for")
_TABLES = """
CREATE TABLE IF NOT EXISTS blocks (
    hash BLOB PRIMARY KEY, parent BLOB NOT NULL, fingerprint BLOB NOT NULL, tokens BLOB NOT NULL,
    file_bytes INTEGER NOT NULL, checksum BLOB NOT NULL, used INTEGER NOT NULL,
    read INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS heads (
    ordinal INTEGER PRIMARY KEY, first INTEGER NOT NULL, agent TEXT NOT NULL,
    fingerprint BLOB NOT NULL, chain BLOB NOT NULL, checkpoints BLOB NOT NULL,
    num_tokens INTEGER NOT NULL, turns BLOB NOT NULL, last_used REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS agents (
    agent TEXT PRIMARY KEY, pinned INTEGER NOT NULL, bytes_written INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS days (
    date INTEGER PRIMARY KEY, clock INTEGER NOT NULL, bytes_written INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS doomed (hash BLOB PRIMARY KEY) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS written_for (
    hash BLOB NOT NULL, agent TEXT NOT NULL, PRIMARY KEY (hash, agent)
) STRICT;
"""


@dataclass(frozen=True, slots=True)
class HeadRow:
    """A head as it was written; which of its blocks are still there is another matter."""

    ordinal: int
    first: int
    agent: str
    fingerprint: BlockHash
    chain: tuple[BlockHash, ...]
    checkpoints: tuple[BlockHash, ...]
    num_tokens: int
    turns: tuple[Turn, ...]
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

    @classmethod
    def read_only(cls, path: Path) -> "Index":
        """To look at, also while another process writes.  Raises sqlite3.Error."""
        uri = f"{path.absolute().as_uri()}?mode=ro"
        return cls(sqlite3.connect(uri, uri=True, timeout=_LOOK_BUSY_S))

    def blocks(self) -> Iterator[tuple[BlockFile, int, int]]:
        """(file, when used, when read) of every row whose hash is the hash of its tokens.

        The file that was read longest ago comes first.
        """
        columns = "hash, parent, tokens, fingerprint, file_bytes, checksum, used, read"
        for row in self._db.execute(f"SELECT {columns} FROM blocks ORDER BY read"):
            block_hash, parent, tokens, *rest, used, read = row
            if len(parent) != HASH_BYTES or len(tokens) not in _TOKENS_BYTES:
                continue
            if block := _named(block_hash, parent, tokens):
                yield BlockFile(block, *rest), used, read

    def last_clock(self) -> int:
        """Of everything that was ever written here and is left.  Raises ValueError if it is odd."""
        tables = (("used", "blocks"), ("read", "blocks"), ("clock", "days"))
        asked = (self._db.execute(f"SELECT max({c}) FROM {table}") for c, table in tables)
        last = max(int(answer.fetchone()[0] or 0) for answer in asked)
        if last not in _CLOCKS:
            raise ValueError(f"the clock cannot be at {last}")
        return last

    def heads(self) -> Iterator[HeadRow]:
        """Oldest first."""
        columns = "ordinal, first, agent, fingerprint, chain, checkpoints, num_tokens"
        sql = f"SELECT {columns}, turns, last_used FROM heads ORDER BY ordinal"
        for row in self._db.execute(sql):
            ordinal, first, agent, fingerprint, chain, checkpoints, num_tokens, *rest = row
            if not isinstance(agent, str) or min(ordinal, first, num_tokens) < 1:
                raise ValueError(f"head {ordinal} is none")
            turns, last_used = rest
            yield HeadRow(
                *(ordinal, first, agent, fingerprint, _hashes(chain), _hashes(checkpoints)),
                *(num_tokens, _turns(turns), float(last_used)),
            )

    def agents(self) -> Iterator[tuple[str, bool, int]]:
        """(name, whether pinned, bytes written in its name)"""
        for agent, pinned, written in self._db.execute(
            "SELECT agent, pinned, bytes_written FROM agents"
        ):
            yield agent, bool(pinned), int(written)

    def days(self) -> Iterator[tuple[int, int, int]]:
        """(date, clock, bytes written): see store/days.py"""
        for row in self._db.execute("SELECT date, clock, bytes_written FROM days"):
            date, clock, written = map(int, row)
            yield date, clock, written

    def doomed(self) -> set[BlockHash]:
        """Blocks without a row whose files are to go, if they have not gone yet."""
        sql = "SELECT hash FROM doomed WHERE hash NOT IN (SELECT hash FROM blocks)"
        return {block_hash for (block_hash,) in self._db.execute(sql)}

    def written_for(self) -> list[tuple[BlockHash, str]]:
        """(block, agent), in the order of writing: of turns that have not ended."""
        if not self._has("written_for"):
            return []
        found = self._db.execute("SELECT hash, agent FROM written_for ORDER BY rowid").fetchall()
        if not all(isinstance(agent, str) for _, agent in found):
            raise ValueError("a block was written for nobody")
        return found

    def _has(self, table: str) -> bool:
        """One that is only looked at may have been made before there was such a table."""
        sql = "SELECT 1 FROM sqlite_master WHERE name = ?"
        return self._db.execute(sql, (table,)).fetchone() is not None

    def copy_of_owners(self) -> Iterator[Statement]:
        """What makes its agents and heads anew in another index, and whose the rest is."""
        for table in filter(self._has, _OF_AGENTS):
            for row in self._db.execute(f"SELECT * FROM {table}"):
                places = ", ".join("?" * len(row))
                yield f"INSERT OR REPLACE INTO {table} VALUES ({places})", row

    def commit(self, statements: Iterable[Statement]) -> None:
        """All of them, in order, on disk when this returns; or none.  Raises sqlite3.Error."""
        with self._db:
            for sql, values in statements:
                self._db.execute(sql, values)

    def wipe_log(self) -> bool:
        """Empty the write-ahead log.  False if a reader is in the way.  Raises sqlite3.Error."""
        [busy, *_] = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        return not busy

    def close(self) -> None:
        self._db.close()


def is_in_use(error: Exception) -> bool:
    return _kind(error) == sqlite3.SQLITE_BUSY


def may_be_good(error: Exception) -> bool:
    """The file could not be read or written just now, which says nothing of what is in it: the disk
    is full, no more files can be opened, another program is at work there."""
    return _kind(error) in _NOT_THE_FILES


def _kind(error: Exception) -> int:
    """SQLite's code without what is finer."""
    code: int = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    return code & 0xFF


def put_block(file: BlockFile, used: int) -> Statement:
    block = file.block
    row = (block.hash, block.parent, file.fingerprint, block.tokens)
    sql = "INSERT OR REPLACE INTO blocks VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
    return sql, (*row, file.file_bytes, file.checksum, used, used)


def set_used(block_hash: BlockHash, used: int) -> Statement:
    return "UPDATE blocks SET used = ? WHERE hash = ?", (used, block_hash)


def set_read(block_hash: BlockHash, read: int) -> Statement:
    return "UPDATE blocks SET read = ? WHERE hash = ?", (read, block_hash)


def drop_block(block_hash: BlockHash) -> Statement:
    return "DELETE FROM blocks WHERE hash = ?", (block_hash,)


def doom_block(block_hash: BlockHash) -> list[Statement]:
    """Its row goes now, its file after; a start makes sure of that."""
    return [
        drop_block(block_hash),
        ("DELETE FROM written_for WHERE hash = ?", (block_hash,)),
        ("INSERT OR IGNORE INTO doomed VALUES (?)", (block_hash,)),
    ]


def drop_doomed(block_hash: BlockHash) -> Statement:
    return "DELETE FROM doomed WHERE hash = ?", (block_hash,)


def drop_all_doomed() -> Statement:
    return "DELETE FROM doomed", ()


def write_for(block_hash: BlockHash, agent_id: str) -> Statement:
    """The block is that agent's, until a head of it says so."""
    return "INSERT OR IGNORE INTO written_for VALUES (?, ?)", (block_hash, agent_id)


def put_agent(agent: Agent) -> list[Statement]:
    """Its row and those of its heads: just these, and only what has changed is written."""
    ordinals = [head.ordinal for head in agent.heads]
    places = ", ".join("?" * len(ordinals))
    row = (
        "INSERT INTO agents VALUES (?, ?, ?)"
        " ON CONFLICT DO UPDATE SET pinned = excluded.pinned WHERE pinned != excluded.pinned"
    )
    others = f"DELETE FROM heads WHERE agent = ? AND ordinal NOT IN ({places})"
    return [
        (row, (agent.id, int(agent.pinned), agent.bytes_written)),
        (others, (agent.id, *ordinals)),
        *(_put_head(agent.id, head) for head in agent.heads),
        _owned_by(agent.id, agent.heads[0]),
    ]


def set_written(agent: Agent) -> Statement:
    sql = "UPDATE agents SET bytes_written = ? WHERE agent = ?"
    return sql, (agent.bytes_written, agent.id)


def drop_agent(agent_id: str) -> list[Statement]:
    return [(f"DELETE FROM {table} WHERE agent = ?", (agent_id,)) for table in _OF_AGENTS]


def drop_all_agents() -> list[Statement]:
    return [(f"DELETE FROM {table}", ()) for table in _OF_AGENTS]


def _owned_by(agent_id: str, head: Head) -> Statement:
    """What it holds needs no other word that it is its agent's."""
    sql = "DELETE FROM written_for WHERE agent = ? AND instr(?, hash)"
    return sql, (agent_id, b"".join(block.hash for block in head.blocks))


def _put_head(agent_id: str, head: Head) -> Statement:
    """A version of a head never changes but by being cut or by losing checkpoints."""
    sql = (
        "INSERT INTO heads VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
        " chain = excluded.chain, checkpoints = excluded.checkpoints,"
        " num_tokens = excluded.num_tokens, turns = excluded.turns"
        " WHERE num_tokens != excluded.num_tokens OR checkpoints != excluded.checkpoints"
    )
    chain = b"".join(block.hash for block in head.chain)
    checkpoints = b"".join(block.hash for block in head.checkpoints)
    turns = np.array(head.turns, "<i8").tobytes()
    row = (head.fingerprint, chain, checkpoints, head.num_tokens, turns, head.last_used)
    return sql, (head.ordinal, head.first, agent_id, *row)


def _named(block_hash: bytes, parent: BlockHash, tokens: bytes) -> Block | None:
    """The block or the checkpoint of these tokens, whichever has that name."""
    if tokens and (block := Block.of(parent, tokens)).hash == block_hash:
        return block
    if len(tokens) == 4 * BLOCK_TOKENS:
        return None
    checkpoint = Block.checkpoint_after(parent, tokens)
    return checkpoint if checkpoint.hash == block_hash else None


def _hashes(raw: bytes) -> tuple[BlockHash, ...]:
    """Names one after another."""
    return tuple(BlockHash(raw[at : at + HASH_BYTES]) for at in range(0, len(raw), HASH_BYTES))


def _turns(raw: bytes) -> tuple[Turn, ...]:
    """Pairs of little-endian int64.  Raises ValueError if it is not."""
    ends = np.frombuffer(raw, "<i8").reshape(-1, 2).tolist()
    return tuple((prompt_end, end) for prompt_end, end in ends)


def _configure(db: sqlite3.Connection) -> None:
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA secure_delete = ON")
    if sys.platform == "darwin":
        db.execute("PRAGMA fullfsync = 1")
        db.execute("PRAGMA checkpoint_fullfsync = 1")
    [answer] = db.execute("PRAGMA quick_check(1)").fetchone()
    if answer != "ok":
        raise sqlite3.DatabaseError(answer)
    db.executescript(_TABLES)
