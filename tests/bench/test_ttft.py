"""The part `ttft` with a real server, and the lengths it leaves out."""

import os
import sys
from pathlib import Path

import pytest
from rich.progress import Progress

from agent_memory.bench import ttft
from agent_memory.bench.bench import Bench, Course
from agent_memory.bench.limits import Limits
from agent_memory.bench.models import chosen
from agent_memory.bench.servers import OURS, Ours
from agent_memory.bench.texts import Pages
from agent_memory.errors import UsageError


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_everything_but_what_is_new_comes_from_memory(tmp_path: Path) -> None:
    models = chosen(["builtin"], tmp_path, float32=True)
    progress = Progress(disable=True)
    course = Course(progress, progress.add_task(""))
    ours = Ours(tmp_path)
    with Limits(tmp_path) as limits:
        bench = Bench("quick", tmp_path, models, ours, [ours], Pages(), limits, course)
        ttft.measure_sizes(bench, ttft.Sizes((300, 1100), 1))
    found = {
        (one.name, one.at["state"], one.at["prompt"], one.at["tokens"]): one for one in bench.notes
    }
    for length in (300, 1100):
        for state in (ttft.RAM, ttft.KILLED, ttft.RESTARTED, ttft.DISK):
            for prompt in (ttft.IDENTICAL, ttft.MORE):
                cached = found[ttft.CACHED, state, prompt, length].median(OURS)
                assert length - 20 < cached < found[ttft.PROMPT, state, prompt, length].median(OURS)
                assert found[ttft.FIRST, state, prompt, length].limit
        assert found[ttft.CACHED, ttft.NONE, ttft.COLD, length].median(OURS) < ttft.NEW_TOKENS


def test_lengths_that_the_context_has_no_room_for_are_left_out(tmp_path: Path) -> None:
    [model] = chosen(["builtin"], tmp_path, float32=True)
    assert ttft.fitting((512, 7900, 8000, 16000), model) == [512, 7900, 8000]


def test_no_length_that_fits_is_an_error(tmp_path: Path) -> None:
    [model] = chosen(["builtin"], tmp_path, float32=True)
    with pytest.raises(UsageError, match="8192 tokens, and 8193"):
        ttft.fitting((8193 - ttft.ROOM_TOKENS,), model)


@pytest.mark.skipif(sys.platform != "linux", reason="nothing else tells and drops it")
def test_what_was_dropped_from_the_page_cache_is_still_there(tmp_path: Path) -> None:
    (tmp_path / "ab").mkdir()
    file, held = tmp_path / "ab" / "block", os.urandom(1 << 20)
    file.write_bytes(held)
    ttft.drop_page_cache(tmp_path)
    before = ttft.bytes_from_disk(os.getpid())
    assert file.read_bytes() == held
    assert ttft.bytes_from_disk(os.getpid()) >= before
    assert ttft.bytes_from_disk(1 << 30) == 0
