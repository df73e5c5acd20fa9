"""Logprobs in the shape of OpenAI's completions: four columns, a row for each token.

Pure; any thread.
"""

import codecs
from collections.abc import Callable, Collection, Sequence
from typing import Any

from agent_memory.request import TokenLogprob

Table = dict[str, list[Any]]


class Columns:
    """Of one answer as it goes on.  `silent`: tokens that generated are no text."""

    def __init__(self, bytes_of: Callable[[int], bytes], silent: Collection[int]) -> None:
        self._bytes_of = bytes_of
        self._silent = silent
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._at = 0  # in the answer's text, in characters

    def prompt(self, text: str, first: int, scored: Sequence[TokenLogprob]) -> Table:
        """Of a prompt that the answer repeats; nothing comes before its first token, so that has
        no logprob."""
        table = _table()
        self._add(table, first, None)
        self._at += _width(text, self._at, self._read(first))
        for one in scored:
            self._add(table, one.token, one)
            self._at += _width(text, self._at, self._read(one.token))
        self._characters.reset()
        self._at = len(text)
        return table

    def more(self, logprobs: Sequence[TokenLogprob]) -> Table:
        table = _table()
        for one in logprobs:
            self._add(table, one.token, one)
            self._at += 0 if one.token in self._silent else len(self._read(one.token))
        return table

    def _read(self, token: int) -> str:
        """The characters that are whole with this token."""
        return self._characters.decode(self._bytes_of(token))

    def _add(self, table: Table, token: int, one: TokenLogprob | None) -> None:
        table["tokens"].append(self._shown(token))
        table["token_logprobs"].append(one and one.logprob)
        table["top_logprobs"].append(one and self._top(one))
        table["text_offset"].append(self._at)

    def _top(self, one: TokenLogprob) -> dict[str, float]:
        """With the token itself; of two that look alike the likelier."""
        found: dict[str, float] = {}
        for token, logprob in sorted(
            [*one.top, (one.token, one.logprob)], key=_likely, reverse=True
        ):
            found.setdefault(self._shown(token), logprob)
        return found

    def _shown(self, token: int) -> str:
        raw = self._bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _table() -> Table:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _likely(entry: tuple[int, float]) -> float:
    return entry[1]


def _width(text: str, at: int, piece: str) -> int:
    """How many characters from `at` on a token is.  Tokenizers begin a text with tokens, or with a
    blank, that it does not have."""
    fitting = (part for part in (piece, piece[1:]) if text.startswith(part, at))
    return len(next(fitting, ""))
