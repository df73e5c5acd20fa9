"""Many at once: in which shapes they arrive, and what is seen of them."""

from pathlib import Path

import pytest

from agent_memory.bench import concurrency
from agent_memory.bench.arrivals import at_once, landing, staggered
from agent_memory.bench.concurrency import EQUAL, RAGGED, SIZES, Shape
from agent_memory.bench.servers import CHUNKS, MlxLm, Ours
from agent_memory.bench.streams import Stream
from agent_memory.bench.texts import Pages
from tests.bench.tiny import measured, tiny_model


def test_each_ragged_prompt_is_longer_by_the_same_factor() -> None:
    assert concurrency.ragged(4, 400) == (50, 100, 200, 400)
    assert concurrency.ragged(1, 400) == (50,)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_no_two_shapes_are_noted_under_one_name(sizes: concurrency.Sizes) -> None:
    noted = [tuple(shape.at.values()) for shape in concurrency.shapes(sizes)]
    assert len(noted) == len(set(noted))


def test_a_shape_has_prompts_of_its_lengths() -> None:
    pages = Pages()
    before = pages.num_left
    assert len(Shape(RAGGED, (50, 200)).prompts(pages)) == 2
    assert len(Shape("long prompt", (50, 50), 300).prompts(pages)) == 3
    assert before - pages.num_left == 650


def test_streams_of_a_real_server_arrive_in_every_way(tmp_path: Path) -> None:
    model, pages = tiny_model(tmp_path), Pages()
    with Ours(tmp_path).start([model], "arrivals") as server:
        prompts = [pages.take(length) for length in (60, 60, 300)]
        together = at_once(server, "once", prompts, 40, model)
        assert [len(stream.moments) for stream in together] == [40, 40, 40]
        in_turn = staggered(server, "turn", prompts, 40, model)
        for before, after in zip(in_turn, in_turn[1:], strict=False):
            assert before.moments[0] < after.sent
        landed = landing(server, "long", prompts[:2], pages.take(600), model)
    assert landed.gaps and len(landed.running) == 2 and len(landed.arriving.moments) == 1
    values = concurrency.values_of(Shape(EQUAL, (60,) * 3), together)
    check(values, together)
    alone = concurrency.values_of(Shape(EQUAL, (60,)), together[:1])
    assert concurrency.FAIRNESS not in alone and concurrency.FIRST_P95 not in alone
    seen = concurrency.values_of_landing(landed)
    assert seen[concurrency.LONGEST_WHILE].value == 1000 * max(landed.gaps)


def check(values: concurrency.Values, streams: list[Stream]) -> None:
    assert 0 < values[concurrency.FAIRNESS].value <= 1
    assert values[concurrency.FIRST].value <= values[concurrency.FIRST_P95].value
    gaps = concurrency.GAP, concurrency.GAP_P95, concurrency.LONGEST_GAP
    assert sorted(gaps, key=lambda name: values[name].value) == list(gaps)
    firsts = sorted(stream.first_token_s for stream in streams)
    assert values[concurrency.FIRST].value == 1000 * firsts[1]


@pytest.mark.slow
def test_the_part_compares_every_server_at_every_shape(tmp_path: Path) -> None:
    both = [MlxLm(tmp_path, chunk) for chunk in CHUNKS]
    found = measured(concurrency.PART, tmp_path, *both)
    rates = [one for one in found if one.name == concurrency.RATE]
    assert [(one.at["arrival"], one.at["streams"]) for one in rates] == [
        ("equal", 1),
        ("equal", 4),
        ("long prompt", 1),
    ]
    for one in found:
        landed = one.at["arrival"] == "long prompt"
        servers = {"agent-memory", both[0].name, *([both[1].name] if landed else [])}
        assert set(one.values) == servers
        assert all(len(values) == 1 and values[0] >= 0 for values in one.values.values())
    assert all(one.limit for one in found if one.name == concurrency.FIRST)
    assert rates[0].limit and not rates[2].limit
