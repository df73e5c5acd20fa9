"""What tests with clients share: a real server for each file of them."""

from collections.abc import Iterator

import pytest

from tests.process import Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server")) as server:
        yield server.wait_ready()
