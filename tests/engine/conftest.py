"""The store's own fixtures."""

from tests.store.conftest import checkpoint_at, opener, payload_of, spec

__all__ = ["checkpoint_at", "opener", "payload_of", "spec"]
