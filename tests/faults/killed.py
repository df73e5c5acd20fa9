"""What runs in processes that get killed: a store being written to, a lock being held;
and what must not run as root."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import structlog

from agent_memory.block import Block, BlockHash, chain
from agent_memory.errors import StateDirError
from agent_memory.kv_spec import KVSpec, LayerGroup, TensorFormat
from agent_memory.metrics import Metrics
from agent_memory.store.block_store import BlockStore
from agent_memory.store.files import Bytes
from agent_memory.store.state_dir import StateDir
from tests.store.conftest import NO_LIMITS

FORM = TensorFormat(64, "BF16")
SPEC = KVSpec((LayerGroup("full", (0,), 1, FORM, FORM),), "killed")
TOKENS_A_TURN = 90
NOBODY = 65534

_FORKS = multiprocessing.get_context("forkserver")
"""A process that has imported all this, and has one thread, forks in milliseconds."""
_FORKS.set_forkserver_preload([__name__])


def payload_of(block: Block) -> Bytes:
    random = np.random.default_rng(list(block.hash))
    return random.integers(0, 256, SPEC.payload_bytes(block.num_tokens), np.uint8)


def conversation(name: int, num_turns: int) -> list[Block]:
    """The chain after so many turns; `name` makes it unlike any other."""
    return chain(SPEC.fingerprint, [name, *range(TOKENS_A_TURN * num_turns)])


def keep_saving(tell: Connection, path: Path, name: int) -> None:
    """Turn after turn until killed, telling what is on disk once it is.

    b"present HASH", b"letting HASH" before a block may go, b"head N" after N turns are recorded.
    Two threads tell: a block may be let go of just before it is told to be present.
    """

    def told(block_hash: BlockHash, present: bool) -> None:
        if present:  # it may have been let go of before it was written
            tell.send_bytes(b"present " + block_hash)

    store, tail = BlockStore.open(StateDir.open(path), Metrics(), NO_LIMITS), None
    for num_turns in range(1, 10_000):
        blocks = conversation(name, num_turns)
        for block in blocks:
            if not store.find(block.hash) and not store.pending(block.hash):
                store.put(block, payload_of(block), SPEC, told)
        if tail:
            tell.send_bytes(b"letting " + tail)
        store.record(f"agent-{name}", SPEC.fingerprint, blocks)
        tail = None if blocks[-1].full else blocks[-1].hash
        if num_turns % 3:
            assert store.flush(30)
            tell.send_bytes(b"head %d" % num_turns)


def keep_locked(tell: Connection, path: Path) -> None:
    held = StateDir.open(path)
    tell.send_bytes(str(held.path).encode())
    tell.recv_bytes()


@contextmanager
def child(run: Callable[..., None], *args: Any) -> Iterator[tuple[Any, Connection]]:
    """A process and what it tells; killed with SIGKILL at the end, if it lives."""
    here, there = _FORKS.Pipe()
    process = _FORKS.Process(target=run, args=(there, *args))
    process.start()
    there.close()
    try:
        yield process, here
    finally:
        process.kill()
        process.join()
        here.close()


def open_as_nobody(tell: Connection, path: Path, blocks: list[Block]) -> None:
    """Tells b"opened" and how many of the blocks it can read, or what the start error says."""
    if os.geteuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    try:
        state = StateDir.open(path)
        store = BlockStore.open(state, Metrics())
    except StateDirError as error:
        tell.send_bytes(str(error).encode())
        return
    told: SimpleQueue[bool] = SimpleQueue()
    for block in blocks:
        store.read(block, SPEC, lambda _, payload: told.put(payload is not None))
    num_read = sum(told.get(timeout=10) for _ in blocks)
    assert store.close(10)
    state.close()
    tell.send_bytes(b"opened %d" % num_read)
