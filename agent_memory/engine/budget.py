"""The memory that a loaded model leaves for its sequences: the ledger, as it is opened.

Engine thread only.
"""

from agent_memory.engine.ledger import Ledger
from agent_memory.engine.room import RESERVE_NEW_TOKENS, Cost
from agent_memory.errors import ModelRefused
from agent_memory.model import footprint
from agent_memory.model.loader import LoadedModel

HEADROOM_SHARE = 20
"""One part in so many of the budget is left for what nobody counts."""


def plan(
    loaded: LoadedModel, memory_bytes: int | None, step_tokens: int, spare_bytes: int
) -> tuple[Ledger, Cost]:
    """`spare_bytes`: kept to read blocks into.  Raises ModelRefused if hardly anything is left."""
    spec = loaded.proven.spec
    budget_bytes = memory_bytes or footprint.machine_bytes()
    rows = min(step_tokens, loaded.context_length - 1)
    ledger = Ledger(
        budget_bytes,
        {
            "weights": footprint.weights_bytes(loaded.model),
            "step": footprint.step_bytes(loaded.runner, rows),
            "cache": footprint.limit_cache(budget_bytes),
            "restore": spare_bytes,
            "headroom": budget_bytes // HEADROOM_SHARE,
        },
    )
    cost = Cost(
        footprint.token_bytes(spec), footprint.sequence_bytes(spec), footprint.context_bytes(spec)
    )
    if cost.most_tokens(ledger.spare_bytes) <= RESERVE_NEW_TOKENS:
        raise ModelRefused(
            f"The model leaves no memory for what it is to remember: {_in_mb(ledger)}. Give the "
            "server more --memory-bytes, or choose a smaller model."
        )
    return ledger, cost


def _in_mb(ledger: Ledger) -> str:
    figures = ledger.figures()
    return ", ".join(f"{name} {nbytes >> 20} MB" for name, nbytes in figures.items() if nbytes)
