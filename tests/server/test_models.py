"""Several models over HTTP: real processes, tiny models."""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from agent_memory import cli
from tests.marks import first_is_fast
from tests.model import tiny
from tests.process import START_S, Server

SLASHED = "org/other"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.save("llama", folder / "main")
    tiny.save("qwen3", folder / "other")
    tiny.save("llama", folder / "cut")
    os.truncate(folder / "cut" / "model.safetensors", 500_000)
    tiny.save("qwen3", folder / "deep", num_hidden_layers=40)
    return folder


def flags(folders: Path) -> list[str]:
    models = [str(folders / "main"), f"{SLASHED}={folders / 'other'}", str(folders / "cut")]
    return [flag for model in models for flag in ("--model", model)]


@pytest.fixture(scope="module")
def server(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server"), *flags(folders)) as server:
        yield server.wait_ready()


def status(server: Server) -> dict[str, str]:
    return {model["id"]: model["status"] for model in server.get("/v1/models").json()["data"]}


def cached(answer: Any) -> int:
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def verb(server: Server, model: str, name: str) -> Any:
    return server.post({}, f"/v1/models/{model}/{name}")


@pytest.mark.parametrize("spelt", [SLASHED, SLASHED.replace("/", "%2F")])
def test_a_name_may_hold_slashes(server: Server, spelt: str) -> None:
    assert verb(server, spelt, "load").json()["status"] == "ready"
    entry = server.get(f"/v1/models/{spelt}").json()
    assert (entry["id"], entry["default"], entry["pinned"]) == (SLASHED, False, False)
    assert entry["context_length"] == entry["model_context_length"] == 4096
    answer = server.ask("Hello", model=SLASHED, max_tokens=3)
    assert answer.json()["model"] == SLASHED
    assert verb(server, spelt, "unload").json()["status"] == "unloaded"
    assert server.metric(f'model_unloads_total{{model="{SLASHED}"}}') >= 1


@pytest.mark.requirement("B-29")
def test_a_model_is_loaded_for_who_asks_and_memory_outlives_it(server: Server) -> None:
    for model in (None, SLASHED):
        fields = {"model": model} if model else {}
        first = server.ask("Remember me. " * 30, "ann", max_tokens=4, **fields)
        name = model or "main"
        assert verb(server, name, "unload").status_code == 200
        assert status(server)[name] == "unloaded"
        assert server.get("/readyz").status_code == 200
        again = server.ask("Remember me. " * 30, "ann", max_tokens=4, **fields)
        assert again.json()["choices"] == first.json()["choices"]
        assert cached(again) == again.json()["usage"]["prompt_tokens"] - 1
    assert server.metric("models_resident") == 2


def test_errors_say_what_to_do(server: Server) -> None:
    refused = verb(server, "cut", "load")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "model_failed")
    assert "bytes are missing at its end" in refused.json()["error"]["message"]
    assert server.ask("Hello", model="cut").status_code == 503
    assert status(server)["cut"] == "failed"
    assert "bytes are missing" in server.get("/readyz").json()["models"]["cut"]["failure"]
    assert verb(server, "cut", "unload").json()["status"] == "unloaded"
    for path in ("nothing/load", "nothing/unload", "/etc/load"):
        refused = server.post({}, f"/v1/models/{path}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    assert server.get("/v1/models/nothing").status_code == 404
    assert server.ask("Hello", model=str(Path("/etc"))).status_code == 404
    assert server.post({"force": True}, "/v1/models/main/load").status_code == 400
    assert server.post({}, "/v1/models/main").status_code == 405
    assert server.ask("Hello", max_tokens=3).status_code == 200


def test_an_agents_memory_is_of_the_model_it_talked_to(server: Server) -> None:
    """Warm, text and export: of the model of its newest head, the default's or not."""
    server.ask("Hello from the other one. " * 20, "olga", model=SLASHED, max_tokens=4)
    server.wait_on_disk("olga")
    tokens = server.get("/v1/agents/olga").json()["tokens"]
    [turn] = server.get("/v1/agents/olga?text=true").json()["heads"]
    assert "from the other one" in turn["turns"][0]["prompt"]
    exported = server.get("/v1/agents/olga/export")
    assert exported.status_code == 200
    verb(server, SLASHED, "unload")
    assert server.get("/v1/agents/olga/export").content == exported.content
    [turn] = server.get("/v1/agents/olga?text=true").json()["heads"]
    assert "prompt" not in turn["turns"][0]
    assert server.post({}, "/v1/agents/olga/warm").json()["tiers"]["memory"] == tokens
    assert status(server)[SLASHED] == "ready"


def test_the_command_line(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "load", SLASHED, "--url", server.url]) == 0
    assert cli.main(["models", "ls", "--url", server.url]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("main", SLASHED, "ready", "4,096", "mixed"))
    assert cli.main(["models", "unload", SLASHED, "--json", "--url", server.url]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "unloaded"
    assert cli.main(["models", "load", "cut", "--url", server.url]) == 1
    assert "bytes are missing" in capsys.readouterr().err


def test_after_a_restart_the_other_model_finds_its_agents(folders: Path, tmp_path: Path) -> None:
    asked = {"model": SLASHED, "max_tokens": 4}
    with Server(tmp_path, *flags(folders)).wait_ready() as server:
        first = server.ask("Remember me. " * 30, "ann", **asked)
        server.wait_on_disk("ann")
    with Server(tmp_path, *flags(folders), "--context-length", "1024") as server:
        server.wait_ready()
        again = server.ask("Remember me. " * 30, "ann", **asked)
        assert again.json()["choices"] == first.json()["choices"]
        assert cached(again) == again.json()["usage"]["prompt_tokens"] - 1
        [default] = [m for m in server.get("/v1/models").json()["data"] if m["default"]]
        assert (default["context_length"], default["model_context_length"]) == (1024, 4096)
        assert "25% of the 4096" in default["warnings"][0]
        assert server.get("/readyz").json()["models"]["main"]["warnings"] == default["warnings"]
        assert server.event("context_length_differs")["warning"] == default["warnings"][0]


@pytest.mark.parametrize("moment", first_is_fast("weights", "files", "room", "self-test"))
def test_a_stop_ends_a_load_at_once(folders: Path, tmp_path: Path, moment: str) -> None:
    models = ["--model", str(folders / "main"), "--model", str(folders / "deep")]
    with Server(tmp_path, *models) as server:
        server.wait_ready()

        def load() -> None:
            with suppress(httpx.HTTPError):  # it is not always answered
                verb(server, "deep", "load")

        def is_there() -> bool:
            lines = server.events("model_loading")
            return any((e["model"], e["step"]) == ("deep", moment) for e in lines)

        loading = threading.Thread(target=load)
        loading.start()
        server.wait_until(is_there)
        began = time.monotonic()
        server.signal()
        assert server.wait(START_S) == 0
        assert time.monotonic() - began < 10  # most of it the process's own end
        stages = server.event("server_shutdown_complete")["stages"]
        assert sum(stage["ms"] for stage in stages.values()) < 4000
        loading.join()
