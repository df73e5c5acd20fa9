"""The demo as a newcomer runs it, and what makes it fail."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from agent_memory.ops.demo_outcome import Outcome, Phase, Turn
from agent_memory.ops.process import Stopped

STAGES = ["stop_admission", "drain", "persist", "stop_engine", "unload_model", "release_memory"]
DEMO = (sys.executable, "-m", "agent_memory", "demo")


def environ(temp: Path, **more: str) -> dict[str, str]:
    """Temporary files go to `temp`, but for MLX's compiled kernels, which take long to make anew.

    No setting comes from outside.
    """
    kernels = Path(tempfile.gettempdir(), "mlx")
    kernels.mkdir(exist_ok=True)
    (temp / "mlx").symlink_to(kernels)
    kept = {name: text for name, text in os.environ.items() if "AGENT_MEMORY" not in name}
    return kept | {"HOME": str(temp), "TMPDIR": str(temp)} | more


def left_in(temp: Path) -> list[Path]:
    return [path for path in temp.iterdir() if path.name != "mlx"]


def demo(temp: Path, *flags: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*DEMO, *flags], env=environ(temp, **more), capture_output=True, text=True, timeout=100
    )


@pytest.mark.requirement("B-12", "B-16")
def test_in_json_every_figure_shows_memory_at_work(tmp_path: Path) -> None:
    done = demo(tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    shown: dict[str, Any] = json.loads(done.stdout)
    assert shown["ok"] and not shown["problems"]
    turns = {(turn["agent"], turn["phase"]): turn for turn in shown["turns"]}
    assert len(turns) == len(shown["turns"]) == 8
    for (agent, phase), turn in turns.items():
        assert turn["right"], turn
        assert turn["same_as_cold"] is (None if phase == "went on" else True)
        prompt_tokens = turns[agent, "cold"]["prompt_tokens"]
        assert 1400 < prompt_tokens < 2100
        if phase == "cold":
            assert turn["from_ram"] + turn["from_disk"] < 20
        elif phase == "again":
            assert (turn["from_ram"], turn["from_disk"]) == (prompt_tokens - 1, 0)
        elif phase == "restarted":
            assert (turn["from_ram"], turn["from_disk"]) == (0, prompt_tokens - 1)
        else:
            assert turn["from_ram"] > prompt_tokens
    assert shown["ratio"] > 1  # how much more depends on what else the machine does
    assert [stage["stage"] for stage in shown["shutdown"]["stages"]] == STAGES
    assert shown["shutdown"]["exit_code"] == 0
    assert shown["state_dir"] is None
    assert not left_in(tmp_path)


@pytest.mark.slow
def test_for_people_there_is_a_table_and_a_kept_directory_to_go_on_with(tmp_path: Path) -> None:
    done = demo(tmp_path, "--keep", "--kv-bits", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "memory in 4 bits" in done.stdout
    assert done.stdout.count("right") == 8 and "wrong" not in done.stdout
    assert "faster than computed" in done.stdout
    assert max(map(len, done.stdout.split("prompt")[1].splitlines()[:10])) <= 80
    [home] = left_in(tmp_path)
    assert f"serve --state-dir {home / 'state'}" in done.stdout
    assert list((home / "state" / "blocks").rglob("*.safetensors"))
    assert "server_shutdown_complete" in (home / "server-2.log").read_text()


@pytest.mark.slow
@pytest.mark.suite("demo with a server that fails", planned=1)
def test_a_server_that_does_not_end_cleanly_fails_the_demo(tmp_path: Path) -> None:
    done = demo(tmp_path, AGENT_MEMORY_FAILPOINTS="shutdown.unload_model")
    assert done.returncode == 1
    assert "FAILED  the server ended with status 70" in done.stdout
    assert "faster than computed" not in done.stdout


def test_a_server_that_does_not_start_is_quoted(tmp_path: Path) -> None:
    done = demo(tmp_path, AGENT_MEMORY_STEP_TOKENS="many")
    assert done.returncode == 70
    assert "AGENT_MEMORY_STEP_TOKENS: 'many' cannot be used" in done.stderr
    assert "Traceback" not in done.stderr
    assert not left_in(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_neither_server_nor_files(tmp_path: Path, number: int) -> None:
    # What a shell starts in the background is told to ignore SIGINT, and passes that on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        DEMO, env=environ(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        said = next(line for line in process.stdout if line.startswith("server "))
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in errors and "Traceback" not in errors
    server_pid = int(said.split()[1].rstrip(":"))
    with pytest.raises(ProcessLookupError):
        os.kill(server_pid, 0)
    assert not left_in(tmp_path)


COLD = Turn("ada", Phase.COLD, "What?", "This.", True, 1000, 3, 0, 600.0)
AGAIN = dataclasses.replace(COLD, phase=Phase.AGAIN, from_ram=999, first_token_ms=20.0)
RESTARTED = dataclasses.replace(AGAIN, phase=Phase.RESTARTED, from_ram=0, from_disk=999)
GONE_ON = dataclasses.replace(AGAIN, phase=Phase.GONE_ON, question="And?", answer="That.")
GOOD = (COLD, AGAIN, RESTARTED, GONE_ON)


def test_a_good_outcome_has_no_problems() -> None:
    outcome = Outcome("builtin", 8, list(GOOD), [Stopped(0, [])])
    assert outcome.problems() == []
    assert outcome.ratio == 30.0
    assert [outcome.same_as_cold(turn) for turn in GOOD] == [True, True, True, None]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"answer": "Thus."}, "ada, restarted: the answer is not the cold one"),
        ({"from_disk": 500}, "ada, restarted: only 500 of 1000 tokens were remembered"),
        ({"from_ram": 999, "from_disk": 0}, "ada, restarted: nothing came from disk"),
    ],
)
def test_what_is_not_as_promised_is_a_problem(change: dict[str, Any], problem: str) -> None:
    turns = [COLD, AGAIN, dataclasses.replace(RESTARTED, **change), GONE_ON]
    assert Outcome("builtin", 8, turns).problems() == [problem]


def test_a_server_that_failed_to_stop_is_a_problem() -> None:
    stops = [Stopped(0, []), Stopped(70, [])]
    problems = Outcome("builtin", 8, list(GOOD), stops).problems()
    assert problems == ["the server ended with status 70"]
