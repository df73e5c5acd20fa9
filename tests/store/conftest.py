"""A small model's spec, payloads that follow from the block's hash, and stores that get closed."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt
import pytest

from agent_memory.block import BLOCK_TOKENS, Block, BlockHash, chain, token_bytes
from agent_memory.kv_spec import KVSpec, LayerGroup, StateFormat, TensorFormat
from agent_memory.metrics import Metrics
from agent_memory.store.block_store import BlockStore
from agent_memory.store.limits import Limits
from agent_memory.store.state_dir import StateDir

NO_LIMITS = Limits(1 << 60, 0, None, None, free_bytes=lambda path: 1 << 60)
"""Not even that of the disk itself: writing finds that out."""

TOKENS = range(600)
ENDS = (100, 256, 300, 512, 600)

PayloadOf = Callable[[Block], npt.NDArray[np.uint8]]
CheckpointAt = Callable[[Sequence[int], int], Block]


@pytest.fixture
def spec() -> KVSpec:
    packed = TensorFormat(64, "BF16", bits=4, group_size=32)
    dense = TensorFormat(8, "BF16")
    groups = (
        LayerGroup("full", (0, 2), 1, packed, packed),
        LayerGroup("window", (1,), 2, dense, dense, window=128),
    )
    states = (StateFormat(3, 0, (2, 48), "BF16"), StateFormat(3, 1, (4, 8, 8), "F32"))
    return KVSpec(groups, "small", states)


@pytest.fixture
def checkpoint_at(spec: KVSpec) -> CheckpointAt:
    """Of the first so many of these tokens."""

    def checkpoint(tokens: Sequence[int], end: int) -> Block:
        start = end // BLOCK_TOKENS * BLOCK_TOKENS
        blocks = chain(spec.fingerprint, tokens[:start])
        parent = blocks[-1].hash if blocks else spec.fingerprint
        return Block.checkpoint_after(parent, token_bytes(tokens[start:end]))

    return checkpoint


@pytest.fixture
def blocks(spec: KVSpec) -> list[Block]:
    """A conversation's, the last not full; `checkpoints` are of it."""
    return chain(spec.fingerprint, TOKENS)


@pytest.fixture
def checkpoints(checkpoint_at: CheckpointAt) -> list[Block]:
    return [checkpoint_at(TOKENS, end) for end in ENDS]


@pytest.fixture
def payload_of(spec: KVSpec) -> PayloadOf:
    def payload(block: Block) -> npt.NDArray[np.uint8]:
        random = np.random.default_rng(list(block.hash))
        return random.integers(0, 256, spec.bytes_of(block), np.uint8)

    return payload


def names(*blocks: Block) -> set[str]:
    return {block.hash.hex() for block in blocks}


class Opener:
    """Opens stores on one directory, one after the other, each with metrics of its own, and works
    with the one that is open."""

    def __init__(self, path: Path, spec: KVSpec, payload_of: PayloadOf) -> None:
        self.path = path
        self.spec = spec
        self.payload_of = payload_of
        self.metrics = Metrics()
        self.limits = NO_LIMITS
        self._open: tuple[StateDir, BlockStore] | None = None

    @property
    def state(self) -> StateDir:
        assert self._open is not None
        return self._open[0]

    @property
    def store(self) -> BlockStore:
        assert self._open is not None
        return self._open[1]

    def open(self) -> BlockStore:
        self.close()
        self.metrics = Metrics()
        state = StateDir.open(self.path)
        try:
            store = BlockStore.open(state, self.metrics, self.limits)
        except BaseException:
            state.close()
            raise
        self._open = state, store
        store.check()
        return store

    def close(self) -> None:
        if self._open is not None:
            assert self.store.close(10)
            self.state.close()
            self._open = None

    def put(self, *blocks: Block, agent_id: str | None = None) -> list[bool]:
        """Put them and wait.  Whether each is present."""
        told: SimpleQueue[tuple[BlockHash, bool]] = SimpleQueue()
        for block in blocks:
            payload = self.payload_of(block)
            self.store.put(block, payload, self.spec, lambda *a: told.put(a), agent_id)
        answers = dict(told.get(timeout=10) for _ in blocks)
        return [answers[block.hash] for block in blocks]

    def read(self, block: Block) -> bool:
        """Whether it is read back.  What is read is right."""
        told: SimpleQueue[tuple[Block, npt.NDArray[np.uint8] | None]] = SimpleQueue()
        self.store.read(block, self.spec, lambda *a: told.put(a))
        found, payload = told.get(timeout=10)
        assert found == block
        assert self.store.flush(10)  # what a bad file sets off
        if payload is not None:
            np.testing.assert_array_equal(payload, self.payload_of(block))
        return payload is not None

    def file(self, block: Block) -> Path:
        name = block.hash.hex()
        return self.path / "blocks" / name[:2] / f"{name}.safetensors"

    def files(self) -> set[str]:
        """Names of blocks, once all that was asked for is done."""
        assert self.store.flush(5)
        self.store.check()
        return {path.stem for path in self.path.glob("blocks/*/*")}

    def quarantined(self) -> list[str]:
        """Names of blocks in quarantine."""
        return [path.name[:64] for path in (self.path / "quarantine").glob("*.safetensors.*")]

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"agent_memory_{name}", labels) or 0.0


@pytest.fixture
def opener(tmp_path: Path, spec: KVSpec, payload_of: PayloadOf) -> Iterator[Opener]:
    opener = Opener(tmp_path / "state", spec, payload_of)
    yield opener
    opener.close()
