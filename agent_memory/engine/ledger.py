"""Every byte the server may use, and who has it: one account for all of it.

    budget  >=  cache + restore + headroom                       fixed for good
              + weights and step of each loaded model            fixed while it is loaded
              + pool, and runs and context of each model         as measured before each decision
              + a tail for each sequence                         held from admission to the end

Knows names and numbers only.  Pure; engine thread only, but for `spare_bytes`, which any thread may
read.
"""

from collections.abc import Hashable, Mapping


def account(what: str, model: str) -> str:
    """The name of a model's own."""
    return f"{what}:{model}" if model else what


class Ledger:
    def __init__(self, budget_bytes: int, fixed: Mapping[str, int]) -> None:
        self.budget_bytes = budget_bytes
        self._fixed = dict(fixed)
        self._measured: dict[str, int] = {}
        self._held: dict[Hashable, int] = {}
        self.spare_bytes = 0
        self._count_spare()

    def _count_spare(self) -> None:
        """What an idle server with an empty pool has left."""
        self.spare_bytes = self.budget_bytes - sum(self._fixed.values())

    @property
    def used_bytes(self) -> int:
        accounts = (self._fixed, self._measured, self._held)
        return sum(sum(amounts.values()) for amounts in accounts)

    @property
    def free_bytes(self) -> int:
        """Below zero when what was measured has outgrown what was decided."""
        return self.budget_bytes - self.used_bytes

    def fix(self, name: str, nbytes: int) -> None:
        """In place of what the account had before."""
        assert nbytes >= 0 and name not in self._measured
        self._fixed[name] = nbytes
        self._count_spare()

    def measure(self, name: str, nbytes: int) -> None:
        assert nbytes >= 0 and name not in self._fixed
        self._measured[name] = nbytes

    def close(self, name: str) -> None:
        """There may be none of this name."""
        self._fixed.pop(name, None)
        self._measured.pop(name, None)
        self._count_spare()

    def hold(self, holder: Hashable, nbytes: int) -> None:
        """In place of what it held before."""
        assert nbytes >= 0
        self._held[holder] = nbytes

    def held_by(self, holder: Hashable) -> int:
        return self._held.get(holder, 0)

    def release(self, holder: Hashable) -> None:
        """One that holds nothing, such as a request that never began, releases nothing."""
        self._held.pop(holder, None)

    def holders(self) -> set[Hashable]:
        return set(self._held)

    def figures(self) -> dict[str, int]:
        amounts = {**self._fixed, **self._measured, "tails": sum(self._held.values())}
        return {**amounts, "budget": self.budget_bytes}
