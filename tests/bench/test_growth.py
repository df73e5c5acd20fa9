"""How costs grow: the part itself, in small."""

from pathlib import Path

import pytest

from agent_memory.bench import growth
from agent_memory.bench.servers import CHUNKS, MlxLm
from tests.bench.tiny import measured


@pytest.mark.slow
def test_the_part_tells_costs_by_context_agents_and_blocks(tmp_path: Path) -> None:
    found = measured(growth.PART, tmp_path, MlxLm(tmp_path, CHUNKS[0]))
    sizes = growth.SIZES["quick"]
    restored = [one for one in found if one.name == growth.KNOWN]
    assert [(one.at["tokens"], one.at["from"]) for one in restored] == [
        (tokens, place) for place in ("RAM", "disk, after a restart") for tokens in sizes.contexts
    ]
    assert all(one.limit for one in restored)
    lists = [one for one in found if one.name == growth.LIST]
    assert [one.at["agents"] for one in lists] == list(sizes.agents)
    starts = [one for one in found if one.name == growth.START]
    assert [one.at["blocks"] for one in starts] == list(sizes.blocks)
    assert all(len(v) == sizes.rounds for one in found for v in one.values.values())
