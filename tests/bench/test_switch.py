"""The part `switch` with real servers, and what it says of models that it cannot be done with."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.progress import Progress

from agent_memory.bench import switch
from agent_memory.bench.bench import Bench, Course
from agent_memory.bench.limits import Limits
from agent_memory.bench.measured import Measured
from agent_memory.bench.models import Model, check_contexts, chosen, context_tokens
from agent_memory.bench.servers import OURS, Ours, Peer
from agent_memory.bench.texts import Pages
from agent_memory.errors import UsageError


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """The built-in model under two names, so that nothing is computed for long."""
    [model] = chosen(["first=builtin"], tmp_path, float32=True)
    models = [model, Model("second", model.source)]
    progress = Progress(disable=True)
    course = Course(progress, progress.add_task(""))
    ours = Ours(tmp_path)
    with Limits(tmp_path) as limits:
        yield Bench("quick", tmp_path, models, ours, [ours], Pages(), limits, course)


def measured(bench: Bench, name: str, **at: object) -> Measured:
    [one] = [m for m in bench.notes if m.name == name and at.items() <= m.at.items()]
    return one


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_agents_said_is_restored_by_either_switch(bench: Bench) -> None:
    """Of two names for one model the second has nothing to compute, so the sizes stay small."""
    switch.measure_sizes(bench, switch.Sizes(agents=2, tokens=400, rounds=1))
    for way in ("hot", "restart"):
        for to in ("first", "second"):
            restored = measured(bench, "tokens restored", switch=way, to=to)
            assert restored.limit is not None
            assert restored.limit - 4 <= restored.median(OURS) < restored.limit
    parts = ("stop", "start", "back at work")
    stop, start, total = (measured(bench, part, switch="restart", to="first") for part in parts)
    assert stop.median(OURS) + start.median(OURS) < total.median(OURS)
    stages = [m.at["stage"] for m in bench.notes if m.name == "stage of the stop"]
    assert len(stages) == 2 * 6


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("second", ["the same", "absent"])
def test_a_peer_that_has_one_model_is_left_out_where_another_is_asked_for(
    bench: Bench, tmp_path: Path, second: str
) -> None:
    """It refuses the other, or answers as if it had not been named."""
    command = f"{sys.executable} -m mlx_lm server --port {{port}} --model {{model}} --temp 0"
    peer, [model, other] = Peer(tmp_path, "peer", command), bench.models
    models = [model, other if second == "the same" else Model("absent", str(tmp_path / "absent"))]
    prompts = {m.name: {"ann": bench.pages.take(60)} for m in models}
    turn = switch.Turn(bench, peer, prompts, switch.Sizes(1, 60, 1), switch.Known())
    assert turn.measure(models) == [model]
    assert {m.at["switch"] for m in bench.notes} == {"first visit", "restart"}
    assert {m.at["to"] for m in bench.notes} == {"first"}
    assert measured(bench, "tokens restored").median("peer") < 60


def test_a_context_that_is_too_small_is_told_before_anything_starts(tmp_path: Path) -> None:
    [model] = chosen(["builtin"], tmp_path, float32=True)
    assert context_tokens(model) == 8192
    check_contexts([model], 8192)
    with pytest.raises(UsageError, match="8193 tokens.*builtin is 8192"):
        check_contexts([model], 8193)


def test_the_context_of_a_model_of_several_parts_and_of_none(tmp_path: Path) -> None:
    file, model = tmp_path / "config.json", Model("some", str(tmp_path))
    file.write_text(json.dumps({"text_config": {"max_position_embeddings": 4096}}))
    assert context_tokens(model) == 4096
    file.write_text("{}")
    assert context_tokens(model) is None
    check_contexts([model], 1 << 20)
