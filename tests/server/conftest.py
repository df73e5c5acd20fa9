"""One ready server for each module that asks for it."""

from collections.abc import Iterator

import pytest

from tests.process import Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server")) as server:
        yield server.wait_ready()
