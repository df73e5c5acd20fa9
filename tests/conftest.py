"""What many tests share: the built-in model, loaded once per setting, and ordinary text."""

import functools
from pydoc_data.topics import topics

import pytest

from agent_memory.model import loader
from agent_memory.model.loader import LoadedModel

pytest_plugins = ["tests.suites"]

KV_BITS = [None, 8, 4]
DEFAULT_KV_BITS = [
    8,
    pytest.param(None, marks=pytest.mark.slow),
    pytest.param(4, marks=pytest.mark.slow),
]
"""The others only where every test runs."""


@functools.cache
def builtin_model(kv_bits: int | None) -> LoadedModel:
    return loader.load_whole("builtin", kv_bits, 64)


@pytest.fixture(params=KV_BITS, ids=lambda bits: f"kv{bits or 'none'}", scope="session")
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    return builtin_model(request.param)


def ordinary_text() -> str:
    """The language reference, as every CPython install has it: some 400,000 characters."""
    return "\n".join(topics[name] for name in sorted(topics))
