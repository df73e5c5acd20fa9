"""The command `store` on real directories, beside a real server and without one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ordinary_text
from tests.process import Server

LONG = "Read this:\n" + ordinary_text()[:2500]


def store(path: Path, verb: str, *args: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("AGENT_MEMORY_")}
    return subprocess.run(
        [sys.executable, "-m", "agent_memory", "store", verb, "--state-dir", str(path), *args],
        env=kept | {"HOME": str(path.parent), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def told(path: Path, verb: str, *args: str, code: int = 0) -> Any:
    done = store(path, verb, "--json", *args)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def fill(server: Server) -> None:
    """ann and ben have a long text in common, somebody without a name has said something else."""
    for agent, text in (("ann", LONG), ("ben", LONG + " And?"), (None, LONG[::-1])):
        server.ask(text, agent=agent, max_tokens=4)
    server.wait_until(lambda: server.metric("blocks_written_total") >= 7)
    server.wait_until(lambda: on_disk(server, "ann") and on_disk(server, "ben"))


def on_disk(server: Server, agent: str) -> bool:
    shown = server.get(f"/v1/agents/{agent}").json()
    return "tiers" in shown and bool(shown["tiers"]["disk"] == shown["tokens"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Server(tmp_path_factory.mktemp("server")) as server:
        fill(server.wait_ready())
        yield server


@pytest.fixture
def left(tmp_path: Path, server: Server) -> Path:
    """A copy of what that server wrote, nobody at work there."""
    copy = tmp_path / "state"
    subprocess.run(["cp", "-r", str(server.state_dir), str(copy)], check=True)
    (copy / "LOCK").unlink()
    return copy


def block_files(path: Path) -> list[Path]:
    return sorted((path / "blocks").rglob("*.safetensors"))


def test_looking_beside_a_running_server(server: Server) -> None:
    seen = told(server.state_dir, "ls")
    assert {agent["id"] for agent in seen["agents"]} == {"ann", "ben"}
    assert seen["blocks"]["count"] == len(block_files(server.state_dir))
    assert seen["unowned"]["count"] >= 2
    (ann,) = [agent for agent in seen["agents"] if agent["id"] == "ann"]
    shown = server.get("/v1/agents/ann").json()
    assert (ann["own"]["count"], ann["shared"]["count"]) == tuple(shown["blocks"].values())
    assert ann["own"]["bytes"] + ann["shared"]["bytes"] == shown["bytes"]
    assert ann["bytes_written"] == shown["bytes_written"] > 0
    verified = told(server.state_dir, "verify")
    assert verified["good"] == seen["blocks"] and not verified["bad"]
    people = store(server.state_dir, "ls").stdout
    assert "ann" in people and "of no agent" in people


@pytest.mark.requirement("L-42")
@pytest.mark.parametrize("args", [("gc",), ("rebuild",), ("wipe", "--yes"), ("verify", "--fix")])
def test_who_is_at_work_is_named(server: Server, args: tuple[str, ...]) -> None:
    done = store(server.state_dir, *args)
    assert done.returncode == 75 and str(server.pid) in done.stderr
    assert server.get("/v1/agents/ann").is_success


@pytest.mark.requirement("L-42")
def test_bad_files_are_found_and_taken_out(left: Path) -> None:
    first, second, third, *_ = block_files(left)
    raw = bytearray(first.read_bytes())
    raw[-1] ^= 1
    first.write_bytes(raw)
    second.write_bytes(second.read_bytes()[:-1])
    third.unlink()
    found = told(left, "verify", code=1)
    reasons = {entry["file"]: entry["reason"] for entry in found["bad"]}
    assert reasons == {str(first): "checksum", str(second): "checksum", str(third): "missing"}
    assert first.exists() and second.exists()
    assert len(told(left, "verify", "--fix")["bad"]) == 3
    assert not first.exists() and not second.exists()
    assert told(left, "verify")["bad"] == []
    assert told(left, "ls")["quarantine"]["count"] == 2


@pytest.mark.requirement("L-42")
def test_collecting_keeps_what_agents_have_in_mind(left: Path) -> None:
    before = told(left, "ls")
    (left / "quarantine" / "odd").write_bytes(b"123")
    (left / "set-aside-1").mkdir()
    (left / "set-aside-1" / "VERSION").write_text("0")
    would = told(left, "gc", "--dry-run")
    assert would["blocks"] == before["unowned"] and would["quarantine"]["count"] == 1
    assert len(block_files(left)) == before["blocks"]["count"]
    assert told(left, "gc") == {**would, "dry_run": False}
    after = told(left, "ls")
    assert after["unowned"]["count"] == after["quarantine"]["count"] == 0
    assert not after["set_aside"]
    assert after["agents"] == before["agents"]
    assert told(left, "verify")["good"] == after["blocks"]


@pytest.mark.requirement("L-42")
@pytest.mark.parametrize("damage", ["none", "index", "gone"])
def test_an_index_made_anew(left: Path, damage: str) -> None:
    before = told(left, "ls")
    if damage != "none":
        for name in ("index.db-wal", "index.db-shm"):
            (left / name).unlink(missing_ok=True)
        if damage == "gone":
            (left / "index.db").unlink()
        else:
            (left / "index.db").write_bytes(b"no database" * 1000)
        assert store(left, "ls").returncode == 73
    assert told(left, "rebuild") == before["blocks"]
    after = told(left, "ls")
    assert after["blocks"] == before["blocks"]
    assert after["agents"] == (before["agents"] if damage == "none" else [])


def test_wiping_asks_first_and_leaves_nothing(left: Path) -> None:
    (left / "config.toml").write_text("")
    refused = store(left, "wipe")
    assert refused.returncode == 64 and "--yes" in refused.stderr and block_files(left)
    assert told(left, "wipe", "--yes")["count"] > 7
    assert {path.name for path in left.iterdir()} == {"LOCK", "run", "config.toml"}
    assert store(left, "ls").returncode == 73


@pytest.mark.requirement("L-42")
def test_wiping_one_agent(left: Path) -> None:
    before = told(left, "ls")
    (ann,) = [agent for agent in before["agents"] if agent["id"] == "ann"]
    assert store(left, "wipe", "--yes", "--agent", "nobody").returncode == 1
    assert told(left, "wipe", "--yes", "--agent", "ann") == ann["own"]
    after = told(left, "ls")
    assert [agent["id"] for agent in after["agents"]] == ["ben"]
    assert after["blocks"]["bytes"] == before["blocks"]["bytes"] - ann["own"]["bytes"]


def test_no_store_is_told(tmp_path: Path) -> None:
    for verb in ("ls", "verify", "gc", "rebuild"):
        done = store(tmp_path / "nothing", verb)
        assert done.returncode == 73 and "--state-dir" in done.stderr
    assert not (tmp_path / "nothing").exists()
