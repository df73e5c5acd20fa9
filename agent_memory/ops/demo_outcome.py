"""What a demo has measured, and whether it shows what it should.  Plain values, no I/O."""

from dataclasses import dataclass, field
from enum import StrEnum
from statistics import mean

from agent_memory.ops.process import Stopped


class Phase(StrEnum):
    COLD = "cold"  # nothing is remembered yet
    AGAIN = "again"  # the same, after the other agent's turn
    RESTARTED = "restarted"  # the same, from a server started anew
    GONE_ON = "went on"  # another question, on top of what was restored


@dataclass(frozen=True, slots=True)
class Turn:
    """One question of one agent.  Tokens from RAM and disk are part of the prompt's."""

    agent: str
    phase: Phase
    question: str
    answer: str
    right: bool
    prompt_tokens: int
    from_ram: int
    from_disk: int
    first_token_ms: float

    @property
    def restored(self) -> bool:
        """Most of it.  A few tokens are the same in every conversation, so also in a cold one."""
        return self.from_ram + self.from_disk > self.prompt_tokens // 2


@dataclass(slots=True)
class Outcome:
    model: str = ""
    kv_bits: int | None = None
    turns: list[Turn] = field(default_factory=list)
    stops: list[Stopped] = field(default_factory=list)

    def first_token_ms(self, phase: Phase) -> float:
        """On average over the agents."""
        return mean(turn.first_token_ms for turn in self.turns if turn.phase is phase)

    @property
    def ratio(self) -> float:
        return self.first_token_ms(Phase.COLD) / self.first_token_ms(Phase.RESTARTED)

    def same_as_cold(self, turn: Turn) -> bool | None:
        """None: this was not asked cold."""
        cold = [t for t in self.turns if t.phase is Phase.COLD and t.agent == turn.agent]
        asked = [t.answer for t in cold if t.question == turn.question]
        return turn.answer == asked[0] if asked else None

    def problems(self) -> list[str]:
        """Why the demo has failed; nothing if it has not."""
        found: list[str] = []
        for turn in self.turns:
            who = f"{turn.agent}, {turn.phase}"
            if self.same_as_cold(turn) is False:
                found.append(f"{who}: the answer is not the cold one")
            if turn.phase is not Phase.COLD and not turn.restored:
                cached = turn.from_ram + turn.from_disk
                found.append(f"{who}: only {cached} of {turn.prompt_tokens} tokens were remembered")
            if turn.phase is Phase.RESTARTED and not turn.from_disk:
                found.append(f"{who}: nothing came from disk")
        found += [
            f"the server ended with status {stop.exit_code}"
            for stop in self.stops
            if stop.exit_code
        ]
        return found
