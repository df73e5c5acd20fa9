"""An agent out of the store into one file, and in again.

Knows that what goes out must not change while it goes, and that what comes in is proven whole
before any of it is kept, and then named anew: a block's name says whose chain it is of, and the
file may be another tenant's.  Methods are for the event loop; what reads or writes files runs in
worker threads, at most a few blocks of an agent are in memory at a time.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from agent_memory.block import Block, BlockHash, root_of
from agent_memory.engine import archive
from agent_memory.engine.agent_verbs import FLUSH_S
from agent_memory.engine.agent_views import spans
from agent_memory.engine.archive import ArchivedBlock, ArchivedHead, ArchiveReader, Manifest
from agent_memory.engine.limits import ModelInfo
from agent_memory.engine.mailbox import Mailbox
from agent_memory.errors import Conflict, EngineFailed, Unavailable
from agent_memory.failpoint import failpoint
from agent_memory.kv_spec import KVSpec
from agent_memory.kvcache.block_pool import BlockPool
from agent_memory.store.agents import Agent
from agent_memory.store.block_store import BlockStore
from agent_memory.store.files import Bytes
from agent_memory.store.format import BlockFile, Rejected, decode, encode, identify, most_file_bytes
from agent_memory.store.heads import Chain, Head, positions
from agent_memory.store.held import HeldFile
from agent_memory.tenants import outside, tenant_of

MAX_ON_THEIR_WAY = 8
"""Blocks of an import that wait for the writer."""
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Model:
    """The one that what is transferred is of."""

    id: str
    spec: KVSpec
    vocab_size: int

    @classmethod
    def of(cls, info: ModelInfo) -> "Model":
        return cls(info.id, info.spec, info.vocab_size)


ModelOf = Callable[[BlockHash | None], Model]
"""The model of a fingerprint, else the default.  Any thread.  Raises Unavailable."""


@dataclass(frozen=True, slots=True)
class WholeFile:
    """A block file that was made in memory."""

    file: BlockFile
    raw: Bytes

    def read(self, spec: KVSpec) -> Bytes:
        return self.raw

    def close(self) -> None:
        pass


class Gone(Exception):
    """A block is neither on disk nor in RAM.  If it just went, the agent does not need it now."""


class Export:
    """A snapshot of an agent's heads.  Close it, read or not."""

    def __init__(self, agent: Agent, model: Model, store: BlockStore) -> None:
        self._model = model
        self._store = store
        self._pieces: dict[BlockHash, HeldFile | WholeFile] = {}
        self._heads = [h for h in agent.heads if h.fingerprint == model.spec.fingerprint]
        self._agent_id = agent.id

    def hold(self, in_pool: Callable[[Block], Bytes | None]) -> None:
        """Whatever becomes of the agent, this stays.  Raises Gone.  Worker thread."""
        archived = [self._hold_head(head, in_pool) for head in self._heads]
        files = [piece.file for piece in self._pieces.values()]
        self.manifest = Manifest(
            agent=outside(self._agent_id),
            model=self._model.id,
            fingerprint=self._model.spec.fingerprint,
            heads=tuple(archived),
            blocks=tuple(ArchivedBlock(f.block.hash, f.file_bytes, f.checksum) for f in files),
        )
        self.num_bytes = self.manifest.archive_bytes

    def _hold_head(self, head: Head, in_pool: Callable[[Block], Bytes | None]) -> ArchivedHead:
        blocks: list[BlockHash] = []
        for block, count in spans(head):
            used = block if count == block.num_tokens else _beginning(block, count)
            if used.hash not in self._pieces:
                piece = self._store.hold(block) or self._made(block, in_pool(block))
                self._pieces[used.hash] = piece if used is block else self._cut(piece, used, block)
            blocks.append(used.hash)
        held = [c.hash for c in head.checkpoints if self._hold_checkpoint(c, in_pool)]
        return ArchivedHead(head.num_tokens, head.turns, tuple(blocks), tuple(held))

    def _hold_checkpoint(self, checkpoint: Block, in_pool: Callable[[Block], Bytes | None]) -> bool:
        """False if it is gone: the conversation is whole without."""
        if checkpoint.hash not in self._pieces:
            piece: HeldFile | WholeFile | None = self._store.hold(checkpoint)
            if piece is None and (payload := in_pool(checkpoint)) is not None:
                piece = self._made(checkpoint, payload)
            if piece is None:
                return False
            self._pieces[checkpoint.hash] = piece
        return True

    def _made(self, block: Block, payload: Bytes | None) -> WholeFile:
        if payload is None:
            raise Gone
        file, pieces = encode(block, payload, self._model.spec)
        return WholeFile(file, np.frombuffer(b"".join(pieces), np.uint8))

    def _cut(self, piece: HeldFile | WholeFile, used: Block, block: Block) -> WholeFile:
        """What was rewound away is not given away."""
        spec = self._model.spec
        try:
            with closing(piece):
                payload = decode(piece.read(spec), piece.file, spec)
        except (Rejected, OSError) as error:
            raise Gone from error
        return self._made(used, beginning_of(payload, spec, block.num_tokens, used.num_tokens))

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The file.  Raises EngineFailed where a block turns out to be damaged."""
        yield self.manifest.head()
        for block, piece in zip(self.manifest.blocks, self._pieces.values(), strict=True):
            yield archive.header(block.name, block.file_bytes)
            try:
                raw = await asyncio.to_thread(piece.read, self._model.spec)
            except (Rejected, OSError) as error:
                self._store.read(piece.file.block, self._model.spec, _ignored)  # to quarantine
                raise EngineFailed(
                    f"A block of '{outside(self._agent_id)}' cannot be read ({error})."
                ) from error
            yield raw.tobytes()
            yield archive.padding(block.file_bytes)
        yield archive.END

    def close(self) -> None:
        for piece in self._pieces.values():
            piece.close()


class Transfer:
    def __init__(
        self, store: BlockStore, pool: BlockPool, mailbox: Mailbox, model_of: ModelOf
    ) -> None:
        self._store = store
        self._pool = pool
        self._mailbox = mailbox
        self._model_of = model_of
        self._importing = asyncio.Lock()

    # ── out ──────────────────────────────────────────────────────────────────────────────────

    async def export(self, agent_id: str) -> Export:
        """Raises NotFound, and Conflict if the agent has nothing in mind under this model."""
        newest = self._store.agents.known(agent_id).heads[0]
        model = self._model_of(newest.fingerprint)
        for _ in range(_ATTEMPTS):
            self._store.agents.known(agent_id)
            await asyncio.to_thread(self._store.flush, FLUSH_S)
            export = self._export(self._store.agents.known(agent_id), model)
            try:
                await asyncio.to_thread(export.hold, self._in_pool)
            except BaseException as error:
                await asyncio.to_thread(export.close)
                if not isinstance(error, Gone):
                    raise
            else:
                return export
        raise Conflict(
            f"A block that '{outside(agent_id)}' has in mind is gone: its file was damaged or "
            "evicted. Go on with the conversation, so that it is computed again, or rewind it.",
            code="incomplete",
        )

    def _export(self, agent: Agent, model: Model) -> Export:
        if all(head.fingerprint != model.spec.fingerprint for head in agent.heads):
            raise Conflict(
                f"'{outside(agent.id)}' has nothing in mind under the model that is served, "
                f"'{model.id}'. Serve the one it talked to.",
                code="other_model",
            )
        return Export(agent, model, self._store)

    def _in_pool(self, block: Block) -> Bytes | None:
        """A copy of the payload of a block that is in RAM only.  Worker thread."""

        def copy() -> Bytes | None:
            if self._pool.find(block.hash) is None:
                return None
            payload = self._pool.hold(block.hash).copy()
            self._pool.release(block.hash)
            return payload

        return self._mailbox.call(copy).result(FLUSH_S)

    # ── in ───────────────────────────────────────────────────────────────────────────────────

    async def receive(self, file: BinaryIO, name: Callable[[str], str]) -> str:
        """Keep what `file` holds; -> the agent's name, which `name` makes from that in the file.

        Raises BadRequest, Conflict or Unavailable; then there is no agent of that name, unless the
        error says that it is only not on disk yet.
        """
        self._model_of(None)
        async with self._importing:
            return await asyncio.to_thread(self._receive, file, name)

    def _receive(self, file: BinaryIO, name: Callable[[str], str]) -> str:
        """Worker thread.  Twice through the file: first to prove it, then to keep it."""
        failpoint("engine.import")
        manifest = ArchiveReader(file).manifest
        model = self._model_of(manifest.fingerprint)
        if manifest.fingerprint != model.spec.fingerprint:
            raise _other_model(manifest, model)
        agent_id = name(manifest.agent)
        self._refuse_taken(agent_id)
        file.seek(0)
        found = {one.block.hash: one.block for one, _ in proven(file, model)}
        proven_heads = [(head, *_conversation(head, found, model)) for head in manifest.heads]
        root = root_of(model.spec.fingerprint, tenant_of(agent_id))
        own = _renamed([chain for _, chain, _ in proven_heads], found, root)
        file.seek(0)
        put = set[BlockHash]()
        try:
            self._keep(agent_id, file, model, own, put)
            self._refuse_taken(agent_id)
        except BaseException:
            self._store.give_up(b for b in reversed(own.values()) if b.hash in put)
            raise
        for head, *parts in reversed(proven_heads):
            chain, checkpoints = (tuple(own[block.hash] for block in part) for part in parts)
            self._store.adopt(
                *(agent_id, model.spec.fingerprint, chain, head.turns), checkpoints=checkpoints
            )
        if not self._store.saved(FLUSH_S):
            raise Unavailable(
                f"'{outside(agent_id)}' is imported, but not all of it is on disk yet. It will be.",
                reason="busy",
                retry_after=5,
            )
        return agent_id

    def _keep(
        self,
        agent_id: str,
        file: BinaryIO,
        model: Model,
        own: Mapping[BlockHash, Block],
        put: set[BlockHash],
    ) -> None:
        """Have every block written that is not there yet.  `own`: what it is here, by its name in
        the file.  `put` gets those that were not there."""
        room, missing = threading.Semaphore(MAX_ON_THEIR_WAY), list[BlockHash]()

        def written(block_hash: BlockHash, present: bool) -> None:
            if not present:
                missing.append(block_hash)
            room.release()

        for found, payload in proven(file, model):
            room.acquire()
            if missing:
                break
            block = own[found.block.hash]
            if self._store.find(block.hash) or self._store.pending(block.hash):
                room.release()
            else:
                put.add(block.hash)
                self._store.put(block, payload, model.spec, written, agent_id)
        self._store.flush(FLUSH_S)
        if missing or any(self._store.find(block.hash) is None for block in own.values()):
            raise Unavailable(
                "Not all blocks could be written; the log says why. The agent was not imported.",
                reason="not_written",
                retry_after=60,
            )

    def _refuse_taken(self, agent_id: str) -> None:
        if self._store.agents.get(agent_id) is not None:
            raise Conflict(
                f"There is an agent '{outside(agent_id)}' already. Import it under another name "
                "with ?name=…, or delete that one first.",
                param="name",
                code="agent_exists",
            )


def _ignored(_block: Block, _payload: Bytes | None) -> None:
    pass


def proven(file: BinaryIO, model: Model) -> Iterator[tuple[BlockFile, Bytes]]:
    """(block, payload) of each block in the file.  Raises BadRequest at the first doubtful one."""
    reader, most_bytes = ArchiveReader(file), most_file_bytes(model.spec)
    for expected in reader.manifest.blocks:
        if expected.file_bytes > most_bytes:  # it would be read into memory
            raise archive.damaged("a block is larger than any of this model")
        raw = np.frombuffer(reader.block(expected), np.uint8)
        try:
            found = identify(raw)
            payload = decode(raw, found, model.spec)
        except Rejected as error:
            raise archive.damaged(f"a block has the wrong {error.reason}") from error
        if (found.block.hash, found.checksum) != (expected.hash, expected.checksum):
            raise archive.damaged("a block is not the one it should be")
        ids = np.frombuffer(found.block.tokens, "<i4")
        if np.any((ids < 0) | (ids >= model.vocab_size)):
            raise archive.damaged("it holds token ids that the model does not know")
        yield found, payload
    reader.end()


def _conversation(
    head: ArchivedHead, found: Mapping[BlockHash, Block], model: Model
) -> tuple[Chain, Chain]:
    """(blocks, checkpoints).  Raises BadRequest unless all of them are its own."""
    chain = _chain(head, found)
    checkpoints = tuple(found[block_hash] for block_hash in head.checkpoints)
    are_some = bool(model.spec.states) and all(block.is_checkpoint for block in checkpoints)
    if checkpoints and not are_some:
        raise archive.damaged("it holds other checkpoints than this model keeps")
    placed = positions(chain[0].parent, chain, checkpoints)
    in_order = tuple(placed[at] for at in sorted(placed) if at <= head.num_tokens)
    if in_order != checkpoints:
        raise archive.damaged("its checkpoints are not of its conversation")
    return chain, checkpoints


def _chain(head: ArchivedHead, found: Mapping[BlockHash, Block]) -> Chain:
    """What it begins with is whoever's it was exported from."""
    chain = tuple(found[block_hash] for block_hash in head.blocks)
    parents = (chain[0].parent, *head.blocks)
    for parent, block in zip(parents, chain, strict=False):
        ends_well = block.full or block is chain[-1]
        if block.parent != parent or block.is_checkpoint or not ends_well:
            raise archive.damaged("its blocks do not follow one another")
    if head.num_tokens != sum(block.num_tokens for block in chain):
        raise archive.damaged("a conversation is not as long as it says")
    return chain


def _renamed(
    chains: Sequence[Chain], found: Mapping[BlockHash, Block], root: BlockHash
) -> dict[BlockHash, Block]:
    """The same blocks and checkpoints in chains that begin with `root`, by the names they had.
    Raises BadRequest."""
    theirs = {chain[0].parent for chain in chains}
    if len(theirs) > 1 or theirs & found.keys():
        raise archive.damaged("its conversations do not begin in one place")
    own, names = dict[BlockHash, Block](), dict.fromkeys(theirs, root)
    for chain in chains:
        for block in chain:
            own[block.hash] = renamed = Block.of(names[block.parent], block.tokens)
            names[block.hash] = renamed.hash
    for block in found.values():
        if block.is_checkpoint:
            own[block.hash] = Block.checkpoint_after(names[block.parent], block.tokens)
    return own


def _other_model(manifest: Manifest, model: Model) -> Conflict:
    return Conflict(
        f"The file is of the model '{manifest.model}' ({manifest.fingerprint.hex()[:16]}), this "
        f"server serves '{model.id}' ({model.spec.fingerprint.hex()[:16]}). Memory fits only the "
        "very model and --kv-bits it was made with: have that one loaded where it is imported.",
        code="other_model",
    )


def _beginning(block: Block, num_tokens: int) -> Block:
    return Block.of(block.parent, block.tokens[: 4 * num_tokens])


def beginning_of(payload: Bytes, spec: KVSpec, num_tokens: int, count: int) -> Bytes:
    """The payload of the first `count` tokens of one of `num_tokens`."""
    cut = np.empty(spec.payload_bytes(count), np.uint8)
    for slot, source in zip(spec.slots(count), spec.slots(num_tokens), strict=True):
        slot.view(cut)[...] = source.view(payload)[:, :, :count]
    return cut
