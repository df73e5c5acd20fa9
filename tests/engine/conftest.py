"""The store's own fixtures."""

from tests.store.conftest import blocks, checkpoint_at, checkpoints, opener, payload_of, spec

__all__ = ["blocks", "checkpoint_at", "checkpoints", "opener", "payload_of", "spec"]
