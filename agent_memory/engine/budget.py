"""The memory that loaded models leave for their sequences: the ledger and what they put in it.

Engine thread only.
"""

from agent_memory.engine.ledger import Ledger, account
from agent_memory.engine.room import Cost
from agent_memory.kv_spec import KVSpec
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


def enter(ledger: Ledger, loaded: LoadedModel, step_tokens: int) -> int:
    """-> what the model takes itself."""
    rows = min(step_tokens, loaded.context_length - 1)
    own = footprint.weights_bytes(loaded.model), footprint.step_bytes(loaded.runner, rows)
    for what, nbytes in zip(OWN, own, strict=True):
        ledger.fix(account(what, loaded.id), nbytes)
    return sum(own)


def leave(ledger: Ledger, model: str) -> None:
    for what in (*OWN, *MEASURED):
        ledger.close(account(what, model))


def cost(spec: KVSpec) -> Cost:
    return Cost(
        footprint.token_bytes(spec), footprint.sequence_bytes(spec), footprint.context_bytes(spec)
    )


def in_mb(ledger: Ledger) -> str:
    figures = ledger.figures()
    return ", ".join(f"{name} {nbytes >> 20} MB" for name, nbytes in figures.items() if nbytes)
