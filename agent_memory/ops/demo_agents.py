"""Who appears in the demo: two agents, what each was told, and what each is asked.

The forms of speech are those the built-in model was trained on; it knows no others.  What it reads
comes from the language reference that every Python has with it.  Plain values.
"""

from dataclasses import dataclass
from pydoc_data.topics import topics

from agent_memory.ops.client import Message

PASSAGES = 4
PASSAGE_CHARACTERS = 1200


@dataclass(frozen=True, slots=True)
class Question:
    """`fact`: what a right answer holds."""

    text: str
    fact: str


@dataclass(frozen=True, slots=True)
class Agent:
    """`first` is asked in every phase, `second` once, when the agent has gone on."""

    name: str
    facts: tuple[str, ...]
    topic: str
    first: Question
    second: Question

    def introduction(self) -> list[Message]:
        """Its facts, and then enough to read that computing it all takes a while."""
        facts = "\n".join(f"- {fact}" for fact in self.facts)
        messages = [*_turn(f"Remember these facts:\n{facts}", "Noted.")]
        for passage in self._passages():
            messages += _turn(f"Read this:\n{passage}", "I have read it.")
        return messages

    def _passages(self) -> list[str]:
        text = topics[self.topic]
        starts = range(0, PASSAGES * PASSAGE_CHARACTERS, PASSAGE_CHARACTERS)
        return [text[start : start + PASSAGE_CHARACTERS].strip() for start in starts]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def _turn(said: str, answered: str) -> list[Message]:
    return [user(said), {"role": "assistant", "content": answered}]


ADA = Agent(
    "ada",
    ("the code for orchid is 7319", "my favorite color is teal"),
    "assignment",
    Question("What is the code for orchid?", "7319"),
    Question("What is my favorite color?", "teal"),
)
BEN = Agent(
    "ben",
    ("my city is Lisbon", "the code for harbor is 2846"),
    "comparisons",
    Question("What is the code for harbor?", "2846"),
    Question("What is my city?", "Lisbon"),
)
AGENTS = (ADA, BEN)
