"""Ordinary text in pieces of a wanted length: what every CPython ships about itself."""

from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer

from agent_memory import builtin

TEMPLATE_TOKENS = 20
"""About what the first line and the chat template add."""


class Pages:
    """Texts of any length, none beginning like another.

    `tokenizer`: a tokenizer.json, whose tokens are counted.
    """

    def __init__(self, tokenizer: Path = builtin.PATH / "tokenizer.json") -> None:
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self._ids = self._tokenizer.encode("\n".join(topics[name] for name in sorted(topics))).ids
        self._at = 0
        self._passes = 0

    def take(self, num_tokens: int) -> str:
        """A prompt of about so many tokens."""
        if self.num_left < num_tokens:
            self._passes += 1
            self._at = 7 * self._passes  # other cuts
        ids = self._ids[self._at : self._at + num_tokens - TEMPLATE_TOKENS]
        self._at += num_tokens
        return "Read this:\n" + str(self._tokenizer.decode(ids))

    @property
    def num_left(self) -> int:
        """Tokens of this pass."""
        return len(self._ids) - self._at


def texts(num_tokens: int) -> Iterator[str]:
    """Texts of about so many tokens, none like another."""
    pages = Pages()
    while pages.num_left > num_tokens:
        yield pages.take(num_tokens)
