"""What the ledger counts for a step is at least what the step takes."""

from pathlib import Path

import mlx.core as mx
import pytest

from agent_memory.engine import budget
from agent_memory.engine.ledger import Ledger
from agent_memory.kvcache.sequence_kv import SequenceKV
from agent_memory.model import footprint, loader
from tests.model import tiny

STEP_TOKENS = 256
LONG = 15 * STEP_TOKENS


@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "deepseek_v3"])
def test_a_step_behind_a_long_context_takes_no_more_than_is_counted(
    kind: str, tmp_path: Path
) -> None:
    """Where no kernel does all of attention at once there are scores for each row and token."""
    loaded = loader.load_whole(str(tiny.save(kind, tmp_path / kind)), 8, 64)
    ledger = Ledger(1 << 30, {})
    _, cost = loader.finish(budget.enter(ledger, loaded, STEP_TOKENS))
    kv = SequenceKV(loaded.proven.spec, None, LONG + STEP_TOKENS)
    for _ in range(0, LONG, STEP_TOKENS):
        footprint.step_bytes(loaded.runner, kv, STEP_TOKENS)
        mx.eval([tail.arrays for tail in kv.tails.values()])
    taken = footprint.step_bytes(loaded.runner, kv, STEP_TOKENS)
    assert taken <= ledger.figures()[f"step:{kind}"] + cost.context_bytes * kv.length
