"""Every byte the server may use, and who has it: one account for all of it.

    budget  >=  weights + step + cache + restore + headroom      fixed from the load on
              + pool + runs + context                            as measured before each decision
              + a tail for each sequence                         held from admission to the end

Knows names and numbers only.  Pure; engine thread only.
"""

from collections.abc import Hashable, Mapping


class Ledger:
    def __init__(self, budget_bytes: int, fixed: Mapping[str, int]) -> None:
        self.budget_bytes = budget_bytes
        self.spare_bytes = budget_bytes - sum(fixed.values())  # of an idle server with empty pool
        self._accounts = dict(fixed)
        self._measured: set[str] = set()
        self._held: dict[Hashable, int] = {}

    @property
    def used_bytes(self) -> int:
        return sum(self._accounts.values()) + sum(self._held.values())

    @property
    def free_bytes(self) -> int:
        """Below zero when what was measured has outgrown what was decided."""
        return self.budget_bytes - self.used_bytes

    def measure(self, account: str, nbytes: int) -> None:
        assert nbytes >= 0 and (account in self._measured or account not in self._accounts)
        self._measured.add(account)
        self._accounts[account] = nbytes

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
        return {**self._accounts, "tails": sum(self._held.values()), "budget": self.budget_bytes}
