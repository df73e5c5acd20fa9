"""A small model's spec, payloads that follow from the block's hash, and stores that get closed."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from agent_memory.block import Block
from agent_memory.kv_spec import KVSpec, LayerGroup, TensorFormat
from agent_memory.metrics import Metrics
from agent_memory.store.block_store import BlockStore
from agent_memory.store.state_dir import StateDir

PayloadOf = Callable[[Block], npt.NDArray[np.uint8]]


@pytest.fixture
def spec() -> KVSpec:
    packed = TensorFormat(64, "BF16", bits=4, group_size=32)
    dense = TensorFormat(8, "BF16")
    groups = (
        LayerGroup("full", (0, 2), 1, packed, packed),
        LayerGroup("window", (1,), 2, dense, dense, window=128),
    )
    return KVSpec(groups, "small")


@pytest.fixture
def payload_of(spec: KVSpec) -> PayloadOf:
    def payload(block: Block) -> npt.NDArray[np.uint8]:
        random = np.random.default_rng(list(block.hash))
        return random.integers(0, 256, spec.payload_bytes(block.num_tokens), np.uint8)

    return payload


class Opener:
    """Opens stores on one directory, one after the other, each with metrics of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state: StateDir | None = None
        self._store: BlockStore | None = None
        self.metrics = Metrics()

    @property
    def state(self) -> StateDir:
        assert self._state is not None
        return self._state

    def open(self) -> BlockStore:
        self.close()
        self.metrics = Metrics()
        self._state = StateDir.open(self.path)
        self._store = BlockStore.open(self._state, self.metrics)
        self._store.check()
        return self._store

    def close(self) -> None:
        if self._store is not None:
            assert self._store.close(10)
        if self._state is not None:
            self._state.close()
        self._state = self._store = None

    def metric(self, name: str, **labels: str) -> float:
        value = self.metrics.registry.get_sample_value(f"agent_memory_{name}", labels)
        return value or 0.0


@pytest.fixture
def opener(tmp_path: Path) -> Iterator[Opener]:
    opener = Opener(tmp_path / "state")
    yield opener
    opener.close()
