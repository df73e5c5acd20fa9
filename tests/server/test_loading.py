"""The server before its model is there, and without one."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from agent_memory import builtin
from tests.marks import first_is_fast
from tests.process import START_S, Server


def copied(folder: Path) -> Path:
    """The built-in model, as a folder of one's own."""
    return shutil.copytree(builtin.PATH, folder, ignore=shutil.ignore_patterns("*.py", "__pyc*"))


@pytest.mark.requirement("L-02")
def test_a_request_that_comes_while_the_model_loads_is_answered(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        assert server.ask("Hello").status_code == 200
        assert server.stream("Hello")[-1] == "[DONE]"


class HeldLoad:
    """A model whose config is a pipe: the load waits for what will be written into it."""

    def __init__(self, folder: Path) -> None:
        self.model = copied(folder)
        self._config = self.model / "config.json"
        self._kept = self.model / "kept.json"
        self._config.rename(self._kept)
        os.mkfifo(self._config)

    def go_on(self) -> None:
        with ExitStack() as stack:
            pipe = stack.enter_context(self._config.open("w"))  # when somebody reads it
            self._kept.rename(self._config)  # for all who read it later
            pipe.write(self._config.read_text())


@pytest.mark.requirement("B-01", "L-01", "L-02", "L-03", "L-04", "L-22")
def test_while_the_model_loads_it_says_so_and_who_asks_waits(tmp_path: Path) -> None:
    load = HeldLoad(tmp_path / "model")
    with Server(tmp_path, "--model", str(load.model)) as server, ThreadPoolExecutor(4) as pool:
        server.wait_for("model_loading", START_S, step="files")
        for _ in range(3):
            alive, ready = server.get("/healthz"), server.get("/readyz")
            assert (alive.status_code, alive.json()["phase"]) == (200, "loading")
            assert (ready.status_code, ready.json()["status"]) == (503, "loading")
            assert ready.json()["progress"]["step"] == "files"
            assert ready.json()["progress"]["elapsed_s"] >= 0
            assert int(ready.headers["retry-after"]) > 0
        listed = server.get("/v1/models").json()["data"][0]
        assert listed["status"] == "loading" and "kv" not in listed
        asked = [pool.submit(server.ask, f"Hello {n}") for n in range(4)]
        server.wait_until(lambda: server.metric("connections") >= 4)
        assert not any(answer.done() for answer in asked)
        load.go_on()
        assert [answer.result(START_S).status_code for answer in asked] == [200] * 4
        assert server.get("/readyz").status_code == 200
        assert server.get("/v1/models").json()["data"][0]["status"] == "ready"
        steps = [line["step"] for line in server.events("model_loading")]
        assert steps == ["files", "fingerprint", "room", "weights", "self-test"]
        assert len(server.events("model_ready")) == 1


@pytest.mark.requirement("B-01", "L-04", "L-05", "L-22")
def test_without_its_model_it_says_why(tmp_path: Path) -> None:
    with Server(tmp_path, "--model", str(tmp_path / "nowhere")) as server:
        server.wait_for("model_failed", START_S)
        ready = server.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (503, "failed")
        assert "nowhere" in ready.json()["failure"] and int(ready.headers["retry-after"]) > 0
        assert server.get("/healthz").status_code == 200
        assert server.get("/v1/models").json()["data"][0]["status"] == "failed"
        for stream in (False, True):
            refused = server.ask("Hello", stream=stream)
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "failed"
            assert "nowhere" in refused.json()["error"]["message"]
            assert int(refused.headers["retry-after"]) > 0
        server.signal()
        assert server.wait(10) == 0


def cut(model: Path) -> None:
    """The weights, as a download that was broken off leaves them."""
    os.truncate(model / "model.safetensors", 100_000)


def asks_for_code(model: Path) -> None:
    config = model / "config.json"
    config.write_text(config.read_text().replace("{", '{"model_file": "own.py",', 1))
    (model / "own.py").write_text(f"open({str(model / 'was-run')!r}, 'w')")


@pytest.mark.requirement("L-05")
@pytest.mark.parametrize("harm", first_is_fast(asks_for_code, cut))
def test_a_model_that_is_not_as_it_should_be_is_named(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    model = copied(tmp_path / "a-model")
    harm(model)
    with Server(tmp_path, "--model", str(model)) as server:
        assert "a-model cannot be loaded: " in server.wait_for("model_failed", START_S)["reason"]
        assert server.get("/readyz").json()["status"] == "failed"
        server.signal()
        assert server.wait(10) == 0
    assert not (model / "was-run").exists()


@pytest.mark.requirement("L-08")
def test_a_model_that_leaves_no_memory_is_refused_with_the_sum(tmp_path: Path) -> None:
    with Server(tmp_path, "--memory-bytes", "64M", "--pool-bytes", "512M") as server:
        said = server.wait_for("model_failed", START_S)["reason"]
        assert "Its weights take 12 MB, and at most 0 MB can be had for them" in said
        assert "restore 64 MB" in said and "--memory-bytes" in said
