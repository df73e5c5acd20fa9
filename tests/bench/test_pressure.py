"""More agents than RAM holds: what must not be, and the part itself."""

from pathlib import Path

import pytest

from agent_memory.bench import pressure
from agent_memory.bench.pressure import Lap
from agent_memory.bench.servers import CHUNKS, MlxLm
from agent_memory.errors import ServerFailed
from tests.bench.tiny import measured

COLD = Lap([0.1], prompt_tokens=100)
KNOWN = Lap([0.1], prompt_tokens=100, cached_tokens=90)
FORGOTTEN = Lap([0.1], prompt_tokens=100, cached_tokens=10)
REFUSED = Lap([0.1], prompt_tokens=100, cached_tokens=90, refused=1)


def test_agents_that_come_back_from_disk_are_as_it_should_be() -> None:
    pressure.check("ours", [COLD, KNOWN, KNOWN], 0.3)


@pytest.mark.parametrize(
    "laps, in_ram, why",
    [
        ([COLD, REFUSED], 0.3, "refused 1"),
        ([COLD, KNOWN, FORGOTTEN], 0.3, "only 10%"),
        ([COLD, KNOWN], 1.0, "nothing was under pressure"),
    ],
)
def test_a_benchmark_of_nothing_fails(laps: list[Lap], in_ram: float, why: str) -> None:
    with pytest.raises(ServerFailed, match=why):
        pressure.check("ours", laps, in_ram)


@pytest.mark.slow
def test_the_part_finds_agents_again_that_ram_does_not_hold(tmp_path: Path) -> None:
    found = measured(pressure.PART, tmp_path, *(MlxLm(tmp_path, chunk) for chunk in CHUNKS))
    by_name = {(one.name, one.at.get("lap")): one for one in found}
    default, limited = f"mlx_lm.server {CHUNKS[0]}", f"mlx_lm.server {CHUNKS[0]}, as much memory as"
    servers = list(by_name[pressure.FIRST, "later"].values)
    assert servers[:2] == ["agent-memory", default] and servers[2].startswith(limited)
    assert by_name[pressure.REMEMBERED, "later"].median("agent-memory") > 0.9
    assert by_name[pressure.IN_RAM, None].median("agent-memory") < 1
    assert by_name[pressure.REFUSED, None].median("agent-memory") == 0
    assert by_name[pressure.FIRST, "first"].limit and by_name[pressure.FIRST, "later"].limit
