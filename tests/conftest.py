"""What many tests share: the built-in model, loaded once per setting, servers, ordinary text."""

import functools
from collections.abc import Iterator
from contextlib import ExitStack
from pydoc_data.topics import topics

import pytest

from agent_memory.model import loader
from agent_memory.model.loader import LoadedModel
from tests.cold import Cold, ColdOf
from tests.marks import first_is_fast
from tests.process import Server

pytest_plugins = ["tests.suites"]

KV_BITS = [None, 8, 4]
DEFAULT_KV_BITS = first_is_fast(8, None, 4)


@functools.cache
def builtin_model(kv_bits: int | None) -> LoadedModel:
    return loader.load_whole("builtin", kv_bits, 64)


@pytest.fixture(params=KV_BITS, ids=lambda bits: f"kv{bits or 'none'}", scope="session")
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    return builtin_model(request.param)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A ready one that nobody stops.  Whoever asks it something has names and texts of their own,
    or does not mind what others have asked."""
    with Server(tmp_path_factory.mktemp("server")) as server:
        yield server.wait_ready()


@pytest.fixture(scope="session")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ColdOf]:
    """Servers that remember nothing, each started when it is first asked for."""
    with ExitStack() as stack:

        @functools.cache
        def cold_of(kv_bits: int | None) -> Cold:
            server = Server(tmp_path_factory.mktemp("cold"), "--kv-bits", str(kv_bits or "none"))
            return Cold(stack.enter_context(server).wait_ready())

        yield cold_of


def ordinary_text() -> str:
    """The language reference, as every CPython install has it: some 400,000 characters."""
    return "\n".join(topics[name] for name in sorted(topics))
