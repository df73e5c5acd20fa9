"""Why was it a miss?  The likely cause by name, from two texts that part.

Knows what clients and templates commonly do to a prompt between two turns.  Pure: token ids in, a
name out; any thread.  Texts are looked at near the parting only, so it takes well under 1 ms.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from agent_memory.block import BLOCK_TOKENS, Loss
from agent_memory.model.tokenizer import ChatTokenizer
from agent_memory.request import Compared, Conversation, Finding

NEAR = 512
"""Tokens after the parting in which numbers and reasoning are looked for."""
BEFORE = 8
"""Tokens before it: a number or a tag may have begun there."""
_SYNC = 8
"""Tokens within which two spellings of one text come together again."""
_PROBE = 48
_OPENING = 8
"""Characters that must be the same before two conversations count as beginning alike."""

_WORD = re.compile(r"\w+")
_WHEN = frozenset(
    "january february march april may june july august september october november december "
    "jan feb mar apr jun jul aug sept sep oct nov dec "
    "monday tuesday wednesday thursday friday saturday sunday mon tues tue wed thurs thu fri sat "
    "sun am pm morning afternoon evening night utc gmt today yesterday tomorrow".split()
)
_NUMBERS = re.compile(r"#(?:[-/:., +#]*#)?")
_TAGS = "think|thinking|reasoning|thought|seed:think"
_OPEN = re.compile(rf"<(?:{_TAGS})>|\[THINK\]|<\|channel\|>analysis")
_CLOSE = re.compile(rf"</(?:{_TAGS})>|\[/THINK\]|<\|end\|>")


class Cause(StrEnum):
    NONE = "none"
    DATE_OR_COUNTER_CHANGED = "date_or_counter_changed"
    TOOLS_REORDERED = "tools_reordered"
    REASONING_DROPPED = "reasoning_dropped"
    REPLY_TOKENIZED_DIFFERENTLY = "reply_tokenized_differently"
    PROMPT_CHANGED = "prompt_changed"
    OTHER_MODEL = "other_model"
    EVICTED = "evicted"
    EXPIRED = "expired"
    DAMAGED_FILE = "damaged_file"
    NEVER_SEEN = "never_seen"
    BACK_TO_CHECKPOINT = "back_to_checkpoint"
    PROMPT_SCORED = "prompt_scored"


_LOST = {
    Loss.EVICTED: Cause.EVICTED,
    Loss.EXPIRED: Cause.EXPIRED,
    Loss.DAMAGED: Cause.DAMAGED_FILE,
    Loss.MISSING: Cause.EVICTED,
    Loss.NO_ROOM: Cause.EVICTED,
}
_FOUND = {
    Finding.WHOLE: Cause.NONE,
    Finding.OTHER_MODEL: Cause.OTHER_MODEL,
    Finding.NOTHING: Cause.NEVER_SEEN,
    Finding.NOT_LOOKED: Cause.PROMPT_SCORED,
}


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as its template saw it.  `agent` None: anonymous."""

    agent: str | None
    tokens: Sequence[int]
    said: Conversation


def cause_of(asked: Asked, compared: Compared, tokenizer: ChatTokenizer) -> Cause:
    if compared.loss is not None:
        return _LOST[compared.loss]
    if compared.went_back > max(0, len(asked.tokens) - compared.position):
        return Cause.BACK_TO_CHECKPOINT  # the greater part of what must be computed
    if compared.finding in _FOUND:
        return _FOUND[compared.finding]
    parting = Parting(asked, compared, tokenizer)
    if parting.is_same_text:
        return Cause.REPLY_TOKENIZED_DIFFERENTLY
    if parting.has_less_reasoning:
        return Cause.REASONING_DROPPED
    if asked.said.tools and parting.has_tools_in_another_order:
        return Cause.TOOLS_REORDERED
    if parting.differs_in_numbers_only and parting.is_in_system:
        return Cause.DATE_OR_COUNTER_CHANGED
    return Cause.PROMPT_CHANGED if parting.is_of_one_conversation else Cause.NEVER_SEEN


class Parting:
    """The prompt (`ours`) and what is remembered (`theirs`), from a little before they part."""

    def __init__(self, asked: Asked, compared: Compared, tokenizer: ChatTokenizer) -> None:
        at = compared.position
        self._asked = asked
        self._compared = compared
        self._tokenizer = tokenizer
        self._before = list(asked.tokens[max(0, at - BEFORE) : at])
        self._ours = list(asked.tokens[at : at + NEAR])
        self._theirs = token_ids(compared.remembered[: 4 * NEAR])

    @property
    def is_same_text(self) -> bool:
        """Other tokens that spell the same, and so does what follows them, or the memory ends."""
        decode = self._tokenizer.decode
        ours = {decode(self._ours[:n]) for n in range(1, 1 + min(_SYNC, len(self._ours)))}
        theirs = {decode(self._theirs[:n]) for n in range(1, 1 + min(_SYNC, len(self._theirs)))}
        whole, remembered = decode(self._ours), decode(self._theirs)
        if whole.startswith(remembered):
            return bool(remembered) and "\ufffd" not in remembered
        alike = len(os.path.commonprefix([whole, remembered]))
        met = (len(text) for text in ours & theirs if text and "\ufffd" not in text)
        return any(length + _OPENING <= alike for length in met)

    @property
    def has_less_reasoning(self) -> bool:
        """A thought is remembered from here on, and the prompt has none, or an empty one."""
        decode = self._tokenizer.decode
        before, theirs = decode(self._before), decode(self._before + self._theirs)
        opened = next((m for m in _OPEN.finditer(theirs) if m.end() >= len(before)), None)
        opened = opened or _last(_OPEN, before)
        if opened is None or opened.start() > len(before) + _OPENING:
            return False
        ours = decode(self._before + self._ours)
        again = _OPEN.match(ours, opened.start())
        dropped = again is None or not _thought(ours, again.end())
        return dropped and bool(_thought(theirs, opened.end()))

    @property
    def has_tools_in_another_order(self) -> bool:
        """Of the tools not yet defined here those that both define from here on, in two orders."""
        decode, at = self._tokenizer.decode, self._compared.position
        theirs = token_ids(self._compared.remembered)
        ours = list(self._asked.tokens[at : at + len(theirs)])
        texts = [self._message(tail)[0] for tail in (ours, theirs)]
        names = {name for tool in self._asked.said.tools if (name := tool_name(tool))}
        if sum(all(name in text for text in texts) for name in names) < 2:
            return False  # the usual case: what is earlier, which may be long, needs no reading
        earlier = decode(list(self._asked.tokens[: max(0, at - BEFORE)]))
        names -= set(_in_order(names, earlier))
        one, other = (_in_order(names, text) for text in texts)
        both = set(one) & set(other)
        return [n for n in one if n in both] != [n for n in other if n in both]

    @property
    def differs_in_numbers_only(self) -> bool:
        """Up to the end of the message or, in long ones, as far as we look."""
        (ours, ours_ends), (theirs, theirs_end) = map(self._message, (self._ours, self._theirs))
        if not _part_in_numbers(ours, theirs):
            return False
        one, other = _shape(ours), _shape(theirs)
        if ours_ends and theirs_end:
            return one == other
        seen = min(len(one), len(other)) - _OPENING  # the last number may be cut in two
        return one[: max(0, seen)] == other[: max(0, seen)]

    def _message(self, tail: list[int]) -> tuple[str, bool]:
        """From a little before the parting to the next special token; whether there is one."""
        special = self._tokenizer.special
        ends = next((n for n, token in enumerate(tail) if token in special), None)
        since = max((n + 1 for n, token in enumerate(self._before) if token in special), default=0)
        return self._tokenizer.decode(self._before[since:] + tail[:ends]), ends is not None

    @property
    def is_in_system(self) -> bool:
        """In a system message, or in no message at all: the template writes dates, too."""
        lines = self._message(self._ours)[0].strip().splitlines()
        probe = lines[-1][-_PROBE:] if lines else ""  # the first may name the role
        having = {str(m["role"]) for m in self._asked.said.messages if probe in str(m["content"])}
        return not having or "system" in having

    @property
    def is_of_one_conversation(self) -> bool:
        """The agent's own; of nobody's, what shares more than a system prompt."""
        at = self._compared.position
        if self._compared.finding is not Finding.OWN:
            return self._asked.agent is None and self._shares_a_message
        if at >= BLOCK_TOKENS or not self._asked.said.messages:
            return True
        decode = self._tokenizer.decode
        first = str(self._asked.said.messages[0]["content"]).strip()
        if first[:_OPENING] in decode(list(self._asked.tokens[:at])):
            return True
        theirs = decode(self._theirs)  # a change at the very beginning leaves lines that are alike
        return any(len(s) > _PROBE and s in theirs for s in decode(self._ours).splitlines()[:-1])

    @property
    def _shares_a_message(self) -> bool:
        at = self._compared.position
        shared = self._tokenizer.decode(list(self._asked.tokens[max(0, at - NEAR) : at]))
        said = (
            str(m["content"]).strip() for m in self._asked.said.messages if m["role"] != "system"
        )
        return any(text and text[-_PROBE:] in shared for text in said)


def tool_name(tool: Mapping[str, Any]) -> str:
    """Of OpenAI's shape or of a plain one."""
    function = tool.get("function")
    name = (function if isinstance(function, Mapping) else tool).get("name")
    return name if isinstance(name, str) else ""


def where_defined(names: Iterable[str], text: str) -> dict[str, int]:
    """Where a rendered prompt describes each tool: as JSON or, if none is so, as a word."""
    names = [name for name in names if name in text]  # quick, where a pattern is not
    for form in (r'"name"\s*:\s*"{}"', r"(?<!\w){}(?!\w)"):
        searched = {name: re.search(form.format(re.escape(name)), text) for name in names}
        if found := {name: match.start() for name, match in searched.items() if match}:
            return found
    return {}


def token_ids(raw: bytes) -> list[int]:
    ids: list[int] = np.frombuffer(raw, "<i4").tolist()
    return ids


def _in_order(names: set[str], text: str) -> list[str]:
    """The tools that `text` defines, in its order."""
    found = where_defined(names, text)
    return sorted(found, key=lambda name: found[name])


def _part_in_numbers(one: str, other: str) -> bool:
    """Where the texts begin to differ both have a number or a date."""
    at = len(os.path.commonprefix([one, other]))
    return all(
        any(m.start() <= at <= m.end() and _is_number(m[0]) for m in _WORD.finditer(text))
        for text in (one, other)
    )


def _is_number(word: str) -> bool:
    """Or a word in a date, or an id with a digit in it."""
    if word.isalpha():
        return word.lower() in _WHEN
    return any(letter.isdigit() for letter in word)


def _thought(text: str, start: int) -> str:
    """What is between an opening tag that ends at `start` and its closing one."""
    closed = _CLOSE.search(text, start)
    return text[start : closed.start() if closed else None].strip()


def _shape(text: str) -> str:
    """The text with every number, date and time as #."""
    words = _WORD.sub(lambda m: "#" if _is_number(m[0]) else m[0], text)
    return _NUMBERS.sub("#", words)


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(reversed(list(pattern.finditer(text))), None)
