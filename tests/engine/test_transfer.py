"""What a head has, checkpoints too, out of one store and into another; and nothing else."""

import asyncio
import io
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from agent_memory.block import Block, BlockHash, chain, root_of, token_bytes
from agent_memory.engine import archive, transfer
from agent_memory.engine.archive import ArchivedBlock, ArchivedHead, ArchiveReader, Manifest
from agent_memory.engine.mailbox import Mailbox
from agent_memory.engine.transfer import Export, Model, Transfer
from agent_memory.errors import BadRequest, Unavailable
from agent_memory.kv_spec import KVSpec
from agent_memory.kvcache.block_pool import BlockPool
from agent_memory.store.agents import Agent
from agent_memory.store.files import Bytes
from agent_memory.store.format import encode, most_file_bytes
from agent_memory.tenants import inside
from tests.store.conftest import TOKENS, CheckpointAt, Opener, PayloadOf

VOCAB_SIZE = 10_000
InPool = Callable[[Block], Bytes | None]


@pytest.fixture
def model(spec: KVSpec) -> Model:
    return Model("small", spec, VOCAB_SIZE)


@pytest.fixture
def other(tmp_path: Path, spec: KVSpec, payload_of: PayloadOf) -> Iterator[Opener]:
    """A store elsewhere."""
    other = Opener(tmp_path / "other", spec, payload_of)
    other.open()
    yield other
    other.close()


def remember(opener: Opener, blocks: Sequence[Block], checkpoints: Sequence[Block]) -> None:
    assert all(opener.put(*blocks, *checkpoints))
    opener.store.record("ann", opener.spec.fingerprint, blocks, (20, 600), checkpoints)
    assert opener.store.flush(5)


def nowhere(block: Block) -> None:
    return None


def exported(opener: Opener, model: Model, in_pool: InPool = nowhere, agent: str = "ann") -> bytes:
    with closing(Export(opener.store.agents.known(agent), model, opener.store)) as export:
        export.hold(in_pool)
        raw = asyncio.run(whole(export))
        assert len(raw) == export.num_bytes
    assert not list((opener.path / "tmp").iterdir())
    return raw


async def whole(export: Export) -> bytes:
    return b"".join([chunk async for chunk in export.chunks()])


def imported(opener: Opener, model: Model, raw: bytes, tenant: str | None = None) -> None:
    pool, mailbox = BlockPool(1 << 20), Mailbox()
    into = Transfer(opener.store, pool, mailbox, lambda _: model)
    agent = into._receive(io.BytesIO(raw), lambda name: inside(tenant, f"{name}-2"))
    assert agent == inside(tenant, "ann-2")


def hashes(blocks: Sequence[Block]) -> tuple[BlockHash, ...]:
    return tuple(block.hash for block in blocks)


def test_a_head_goes_out_with_its_checkpoints_and_comes_in_with_them(
    opener: Opener,
    other: Opener,
    model: Model,
    blocks: list[Block],
    checkpoints: list[Block],
    checkpoint_at: CheckpointAt,
) -> None:
    opener.open()
    branch = [*range(500), 7]
    remember(opener, chain(model.spec.fingerprint, branch), [checkpoint_at(branch, 501)])
    remember(opener, blocks, checkpoints)
    imported(other, model, exported(opener, model))
    here, there = (o.store.agents.known(n) for o, n in ((opener, "ann"), (other, "ann-2")))
    assert len(here.heads) == 2
    for one, again in zip(here.heads, there.heads, strict=True):
        assert (again.chain, again.checkpoints, again.turns) == (
            *(one.chain, one.checkpoints, one.turns),
        )
    assert there.heads[0].checkpoints == tuple(checkpoints)
    other.open()
    assert other.store.agents.known("ann-2").owned() == here.owned()
    assert all(other.read(block) for head in there.heads for block in head.blocks)
    other.store.check()


def tail_of(root: BlockHash, tokens: Sequence[int], end: int) -> Block:
    """The checkpoint after the first `end` tokens behind `root`."""
    before = chain(root, tokens[: end - end % 256])
    parent = before[-1].hash if before else root
    return Block.checkpoint_after(parent, token_bytes(tokens[end - end % 256 : end]))


@pytest.mark.requirement("S-08")
@pytest.mark.parametrize("names", list(product((None, "acme", "zoo"), repeat=2)))
def test_what_a_tenant_exports_is_the_importing_tenants(
    opener: Opener,
    other: Opener,
    model: Model,
    payload_of: PayloadOf,
    names: tuple[str | None, str | None],
) -> None:
    """Names of blocks and of checkpoints follow from the importing one's root; payloads stay."""
    theirs, ours = (root_of(model.spec.fingerprint, name) for name in names)
    ids = [inside(name, agent) for name, agent in zip(names, ("ann", "ann-2"), strict=True)]
    opener.open()
    branch = [*range(500), 7]
    for tokens, end in ((branch, 501), (TOKENS, 300)):
        blocks, point = chain(theirs, tokens), tail_of(theirs, tokens, end)
        assert all(opener.put(*blocks, point))
        opener.store.record(ids[0], model.spec.fingerprint, blocks, (20, end), [point])
    raw = exported(opener, model, agent=ids[0])
    assert b"acme" not in raw and b"zoo" not in raw
    imported(other, model, raw, names[1])
    other.open()
    heads = other.store.agents.known(ids[1]).heads
    assert [head.num_tokens for head in heads] == [600, 501]
    assert [head.chain for head in heads] == [
        tuple(chain(ours, tokens)) for tokens in (TOKENS, branch)
    ]
    assert heads[0].checkpoints == (tail_of(ours, TOKENS, 300),)
    assert heads[1].checkpoints == (tail_of(ours, branch, 501),)
    told: SimpleQueue[Bytes | None] = SimpleQueue()
    for old, new in zip(chain(theirs, TOKENS), heads[0].chain, strict=True):
        other.store.read(new, model.spec, lambda _, payload: told.put(payload))
        np.testing.assert_array_equal(told.get(timeout=10), payload_of(old))
    other.store.check()


def test_what_was_rewound_away_stays_here(
    opener: Opener, other: Opener, model: Model, blocks: list[Block], checkpoints: list[Block]
) -> None:
    store = opener.open()
    remember(opener, blocks, checkpoints)
    store.fork("ann", "ben")
    store.rewind("ann", 400)
    raw = exported(opener, model)
    manifest = ArchiveReader(io.BytesIO(raw)).manifest
    assert manifest.heads[0].checkpoints == hashes(checkpoints[:3])
    assert not any(c.hash.hex().encode() in raw for c in (blocks[1], *checkpoints[3:]))
    assert token_bytes(range(400, 410)) not in raw
    imported(other, model, raw)
    head = other.store.agents.known("ann-2").heads[0]
    assert (head.num_tokens, head.checkpoints) == (400, tuple(checkpoints[:3]))


def test_one_that_is_gone_is_left_out_and_one_in_ram_goes_along(
    opener: Opener,
    other: Opener,
    model: Model,
    blocks: list[Block],
    checkpoints: list[Block],
    payload_of: PayloadOf,
) -> None:
    opener.open()
    remember(opener, blocks, checkpoints)
    gone, in_ram = checkpoints[0], checkpoints[2]
    for checkpoint in (gone, in_ram):
        opener.store._catalog.forget(checkpoint.hash)
    raw = exported(opener, model, lambda block: payload_of(block) if block == in_ram else None)
    imported(other, model, raw)
    assert other.store.agents.known("ann-2").heads[0].checkpoints == tuple(checkpoints[1:])
    assert other.read(in_ram)


# ── hostile files ────────────────────────────────────────────────────────────────────────────────


Parts = tuple[Sequence[Block], Sequence[Block]]


def made(model: Model, payload_of: PayloadOf, *parts: Parts) -> bytes:
    """An archive of heads of these blocks and checkpoints, whatever they are, all checksums
    right."""
    files, members = dict[BlockHash, ArchivedBlock](), list[bytes]()
    for block in dict.fromkeys(block for head in parts for part in head for block in part):
        payload = payload_of(block)[: model.spec.bytes_of(block)]
        file, pieces = encode(block, payload, model.spec)
        files[block.hash] = ArchivedBlock(block.hash, file.file_bytes, file.checksum)
        members.append(archive.member(files[block.hash].name, b"".join(pieces)))
    heads = tuple(
        ArchivedHead(sum(b.num_tokens for b in chain), (), hashes(chain), hashes(points))
        for chain, points in parts
    )
    manifest = Manifest("ann", "small", model.spec.fingerprint, heads, tuple(files.values()))
    return manifest.head() + b"".join(members) + archive.END


def is_refused(opener: Opener, model: Model, raw: bytes, why: str) -> None:
    with pytest.raises(BadRequest, match=why) as caught:
        imported(opener, model, raw)
    assert caught.value.code == "damaged_export"
    assert opener.store.agents.all() == [] and opener.store.disk_bytes == 0


def test_checkpoints_that_are_not_of_the_conversation_are_refused(
    opener: Opener,
    model: Model,
    blocks: list[Block],
    checkpoints: list[Block],
    checkpoint_at: CheckpointAt,
    payload_of: PayloadOf,
) -> None:
    opener.open()
    stranger = checkpoint_at([*range(299), 7], 300)
    later = checkpoint_at(range(700), 601)
    of_a_tail = Block.checkpoint_after(blocks[2].hash, b"")
    for listed in (
        [stranger],
        [*checkpoints, later],
        [of_a_tail],
        checkpoints[::-1],
        [checkpoints[0], checkpoints[0]],
    ):
        raw = made(model, payload_of, (blocks, listed))
        is_refused(opener, model, raw, "checkpoints are not of its conversation")
    raw = made(model, payload_of, (blocks, [blocks[1]]))
    is_refused(opener, model, raw, "other checkpoints than this model keeps")
    for listed in ([*blocks[:2], checkpoints[3]], [blocks[0], checkpoints[1], blocks[2]]):
        raw = made(model, payload_of, (listed, []))
        is_refused(opener, model, raw, "do not follow one another|what it must")
    imported(opener, model, made(model, payload_of, (blocks, checkpoints)))


def test_a_checkpoint_at_the_end_of_a_chain_is_no_block_of_it(
    opener: Opener,
    model: Model,
    blocks: list[Block],
    checkpoint_at: CheckpointAt,
    payload_of: PayloadOf,
) -> None:
    opener.open()
    end = checkpoint_at(TOKENS, 600)
    raw = made(model, payload_of, ([*blocks[:2], end], []))
    is_refused(opener, model, raw, "do not follow one another")


def test_a_model_that_keeps_no_states_takes_no_checkpoints(
    opener: Opener, model: Model, payload_of: PayloadOf
) -> None:
    opener.open()
    plain = replace(model, spec=replace(model.spec, states=()))
    blocks = chain(plain.spec.fingerprint, TOKENS)
    checkpoint = Block.checkpoint_after(plain.spec.fingerprint, b"")
    raw = made(plain, payload_of, (blocks, [checkpoint]))
    is_refused(opener, plain, raw, "other checkpoints than this model keeps")


def test_conversations_that_begin_in_two_places_are_refused(
    opener: Opener, model: Model, blocks: list[Block], payload_of: PayloadOf
) -> None:
    """The middle of one would be taken for the beginning of another."""
    opener.open()
    elsewhere = chain(root_of(model.spec.fingerprint, "acme"), TOKENS)
    for other in (blocks[1:], elsewhere):
        raw = made(model, payload_of, (blocks, []), (other, []))
        is_refused(opener, model, raw, "do not begin in one place")
    imported(opener, model, made(model, payload_of, (elsewhere, [])))


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE])
def test_tokens_that_the_model_does_not_know_are_refused(
    opener: Opener, model: Model, blocks: list[Block], payload_of: PayloadOf, token: int
) -> None:
    opener.open()
    checkpoint = Block.checkpoint_after(blocks[0].hash, token_bytes([1, token]))
    raw = made(model, payload_of, (blocks, [checkpoint]))
    is_refused(opener, model, raw, "token ids that the model does not know")


def test_a_block_larger_than_any_of_the_model_is_refused_unread(
    opener: Opener,
    model: Model,
    blocks: list[Block],
    checkpoints: list[Block],
    payload_of: PayloadOf,
) -> None:
    """What is read is held in memory, whoever sent it."""
    opener.open()
    most = most_file_bytes(model.spec)
    whole = ArchiveReader(io.BytesIO(made(model, payload_of, (blocks, checkpoints)))).manifest
    assert max(block.file_bytes for block in whole.blocks) <= most
    large = ArchivedBlock(blocks[0].hash, most + 1, bytes(16))
    head = ArchivedHead(256, (), hashes(blocks[:1]))
    manifest = replace(whole, heads=(head,), blocks=(large,))
    is_refused(opener, model, manifest.head(), "larger than any of this model")


def test_a_damaged_checkpoint_is_refused_and_nothing_is_kept(
    opener: Opener,
    model: Model,
    blocks: list[Block],
    checkpoints: list[Block],
    payload_of: PayloadOf,
) -> None:
    opener.open()
    raw = made(model, payload_of, (blocks, checkpoints))
    states = payload_of(checkpoints[4]).tobytes()
    assert raw.count(states) == 1
    changed = np.frombuffer(raw, np.uint8).copy()
    changed[raw.index(states)] ^= 1
    is_refused(opener, model, changed.tobytes(), "wrong checksum")


def test_an_import_is_done_when_it_is_on_disk(
    monkeypatch: pytest.MonkeyPatch,
    opener: Opener,
    other: Opener,
    model: Model,
    blocks: list[Block],
) -> None:
    """Until then a crash would take the agent back."""
    opener.open()
    remember(opener, blocks, [])
    raw, adopt = exported(opener, model), other.store.adopt
    monkeypatch.setattr(transfer, "FLUSH_S", 1.0)
    with closing(sqlite3.connect(other.path / "index.db", check_same_thread=False)) as db:

        def locked(*args: Any, **kwargs: Any) -> Agent:
            db.execute("BEGIN IMMEDIATE")
            return adopt(*args, **kwargs)

        monkeypatch.setattr(other.store, "adopt", locked)
        with pytest.raises(Unavailable, match="not all of it is on disk yet"):
            imported(other, model, raw)
        db.rollback()
    assert other.store.saved(10)
    other.open()
    assert other.store.agents.known("ann-2").heads[0].chain == tuple(blocks)


def test_an_import_that_fails_leaves_nothing(
    opener: Opener,
    other: Opener,
    model: Model,
    blocks: list[Block],
    checkpoints: list[Block],
) -> None:
    """But what was there before."""
    opener.open()
    remember(opener, blocks, checkpoints)
    raw = exported(opener, model)
    other.put(blocks[0])
    other.limits = replace(other.limits, disk_bytes=other.store.disk_bytes * 5 // 2)
    other.open()
    with pytest.raises(Unavailable, match="was not imported"):
        imported(other, model, raw)
    assert other.store.flush(5)
    other.store.check()
    assert [path.stem for path in other.path.glob("blocks/*/*")] == [blocks[0].hash.hex()]
    other.open()
    assert other.store.agents.all() == []
