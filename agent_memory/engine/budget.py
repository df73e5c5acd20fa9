"""The memory that loaded models leave for their sequences: the ledger and what they put in it.

Engine thread only.
"""

from collections.abc import Generator

from agent_memory.engine.ledger import Ledger, account
from agent_memory.engine.room import Cost
from agent_memory.kvcache.sequence_kv import SequenceKV
from agent_memory.model import footprint
from agent_memory.model.loader import LoadedModel

HEADROOM_SHARE = 20
"""One part in so many of the budget is left for what nobody counts."""
OWN = ("weights", "step")
MEASURED = ("runs", "context")


def open_ledger(memory_bytes: int | None, spare_bytes: int) -> Ledger:
    """`spare_bytes`: kept to read blocks into."""
    budget_bytes = memory_bytes or footprint.machine_bytes()
    return Ledger(
        budget_bytes,
        {
            "cache": footprint.limit_cache(budget_bytes),
            "restore": spare_bytes,
            "headroom": budget_bytes // HEADROOM_SHARE,
        },
    )


def enter(
    ledger: Ledger, loaded: LoadedModel, step_tokens: int
) -> Generator[None, None, tuple[int, Cost]]:
    """-> what the model takes itself, and what its sequences cost.

    A step at the beginning of a prompt is measured, and one behind it: so much more it takes for
    each token before it.
    """
    spec, rows = loaded.proven.spec, min(step_tokens, loaded.context_length - 1)
    kv, context_bytes = SequenceKV(spec, None, 2 * rows), footprint.context_bytes(spec)
    step_bytes = footprint.step_bytes(loaded.runner, kv, rows)
    yield
    if 2 * rows < loaded.context_length:
        more_bytes = footprint.step_bytes(loaded.runner, kv, rows) - step_bytes
        context_bytes = max(context_bytes, more_bytes // rows)
    own = footprint.weights_bytes(loaded.model), footprint.STEPS_AT_ONCE * step_bytes
    for what, nbytes in zip(OWN, own, strict=True):
        ledger.fix(account(what, loaded.id), nbytes)
    each = footprint.token_bytes(spec), footprint.sequence_bytes(spec)
    return sum(own), Cost(*each, context_bytes)


def leave(ledger: Ledger, model: str) -> None:
    for what in (*OWN, *MEASURED):
        ledger.close(account(what, model))


def in_mb(ledger: Ledger) -> str:
    figures = ledger.figures()
    return ", ".join(f"{name} {nbytes >> 20} MB" for name, nbytes in figures.items() if nbytes)
