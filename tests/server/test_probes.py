"""What clients look at before they ask anything."""

import shutil
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from agent_memory import builtin
from tests.process import CHAT, Server, chat


@pytest.mark.parametrize("path", ["/", "/health", "/healthz", "/readyz", "/metrics", "/v1/models"])
def test_what_is_there_is_there_without_its_body_too(server: Server, path: str) -> None:
    with httpx.Client(base_url=server.url) as client:  # one connection: a body would disturb it
        told, head, again = client.get(path), client.head(path), client.get(path)
    assert (told.status_code, head.status_code, again.status_code) == (200, 200, 200)
    assert told.content and not head.content
    assert head.headers["content-type"] == told.headers["content-type"]
    assert server.call("POST", path, json={}).status_code == 405


def test_the_root_says_what_this_is(server: Server) -> None:
    assert "builtin" in server.get("/").text
    one, other = (server.get(path).json() for path in ("/health", "/healthz"))
    assert one.keys() == other.keys() and one["status"] == other["status"] == "ok"


def test_a_model_that_is_not_here_is_told_which_is(server: Server) -> None:
    for path, body in ((CHAT, chat("x")), ("/v1/completions", {"prompt": "x"})):
        error = server.post({**body, "model": "org/other"}, path).json()["error"]
        assert error["code"] == "model_not_found" and error["param"] == "model"
        assert "'org/other'" in error["message"] and "'builtin'" in error["message"]
    assert "'builtin'" in server.get("/v1/models/org%2Fother").json()["error"]["message"]


def test_a_model_whose_id_has_slashes(tmp_path: Path) -> None:
    name, folder = "org/model", tmp_path / "a model"
    shutil.copytree(builtin.PATH, folder)
    with Server(tmp_path, "--model", f"{name}={folder}") as server:
        (listed,) = server.get("/v1/models").json()["data"]
        assert listed["id"] == name
        for spelt in (name, quote(name, safe="")):
            assert server.get(f"/v1/models/{spelt}").json()["id"] == name
        assert server.get(f"/v1/models/{name}/more").status_code == 404
