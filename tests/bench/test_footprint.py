"""What K and V alone take, and how far a budget goes."""

import pytest

from agent_memory.bench import footprint
from agent_memory.bench.footprint import Case
from agent_memory.bench.limits import KV
from agent_memory.bench.models import Model

MODEL = Model("one", "one")


@pytest.mark.parametrize(("bits", "num_bytes"), [("none", 2048), ("8", 1024), ("4", 512)])
def test_bytes_of_a_token(bits: str, num_bytes: int) -> None:
    assert Case(0, MODEL, bits, KV(values=1024, bits=16), 500).token_bytes == num_bytes


def test_the_budget_is_the_same_for_each_number_of_bits() -> None:
    cases = [Case(0, MODEL, bits, KV(values=7680, bits=32), 500) for bits in footprint.ALL]
    [budget] = {case.budget for case in cases}
    full = cases[0]
    assert 3 <= budget / full.tokens / full.token_bytes < 4
    assert not budget % footprint.MEGABYTE


def test_no_agent_is_longer_than_what_a_small_model_holds() -> None:
    assert max(sizes.agent_tokens for sizes in footprint.SIZES.values()) <= 2048
