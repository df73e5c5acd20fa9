"""What an answer's text is made of: thought, words, and calls of tools, as they come.

Knows the markers that models put around them, with mlx-lm's state machine and parsers, and the form
that calls have when they are forced.  Knows no API.  Pure; the thread of whoever reads.

    text ─► markers ─► reasoning: Thought   normal: Words   tool: CallBegins, CallArguments, …
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from mlx_lm.generate import TextStateMachine, make_text_state_machine
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tool_parsers import json_tools

CALL_START, CALL_END = json_tools.tool_call_start, json_tools.tool_call_end
"""Around {"name": …, "arguments": …}: the form of calls that a grammar makes the model write."""

_JSON_CALL = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_NORMAL, _THOUGHT, _CALL = "normal", "reasoning", "tool"


@dataclass(frozen=True, slots=True)
class Words:
    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """Calls are numbered from 0.  Their arguments come in pieces, one call after another."""

    number: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    number: int
    text: str


Part = Words | Thought | CallBegins | CallArguments
Parser = Callable[[str, Any], Any]


@dataclass(frozen=True, slots=True)
class Markers:
    """A model's own.  `parser` None: it knows no tools."""

    machine: TextStateMachine
    initial: str
    thought: tuple[str, str] | None
    call: tuple[str, str] | None
    parser: Parser | None
    more: tuple[str, ...]

    @classmethod
    def of(cls, wrapper: TokenizerWrapper) -> "Markers":
        edges = [edge for out in wrapper.response_transitions.values() for edge in out]
        return cls(
            machine=make_text_state_machine(wrapper),
            initial=wrapper.response_initial_state or _NORMAL,
            thought=(wrapper.think_start, wrapper.think_end) if wrapper.has_thinking else None,
            call=(wrapper.tool_call_start, wrapper.tool_call_end)
            if wrapper.has_tool_calling
            else None,
            parser=wrapper.tool_parser,
            more=(*wrapper.structural_markers, *(text for text, _ in edges)),
        )

    def hold(self, token: str) -> bool:
        """Whether a special token is a part of one: it must be read, then."""
        return any(
            token in text for text in (*(self.thought or ()), *(self.call or ()), *self.more)
        )

    @property
    def forced(self) -> TextStateMachine:
        edges = {_NORMAL: [(CALL_START, _CALL)], _CALL: [(CALL_END, _NORMAL)]}
        if self.thought:
            edges[_THOUGHT] = [(self.thought[1], _NORMAL)]
        return TextStateMachine(edges)


class AnswerReader:
    """Text in pieces in, parts out.  Joined, the same parts come of it wherever the pieces begin.

    White space between a marker and the words beside it belongs to the markers.  What was to be a
    call and is none stays words: nothing that a model has written is lost.
    """

    def __init__(
        self, markers: Markers, tools: Sequence[object], *, thinks: bool, forced: bool
    ) -> None:
        machine = markers.forced if forced else markers.machine
        self._state = machine.make_state(_THOUGHT if thinks else markers.initial)
        self._now = self._state[0]
        self._tools = tools
        self._around = (CALL_START, CALL_END) if forced else markers.call or ("", "")
        self._parser: Parser | None = json_tools.parse_tool_call if forced else markers.parser
        self._call: _Call | None = None
        self._space = ""  # at the end of what was said: perhaps before a marker
        self._fresh = thinks  # nothing has been said since the last marker
        self.num_calls = 0

    @property
    def thinking(self) -> bool:
        return bool(self._now == _THOUGHT)

    def add(self, text: str) -> list[Part]:
        self._state, segments = TextStateMachine.split(self._state, text)
        return self._parts(segments)

    def end(self) -> list[Part]:
        self._state, rest, state = TextStateMachine.flush(self._state)
        parts = self._parts([(state, rest)])
        if self._call is not None:
            parts += self._end_call(cut=True)
        elif self._space:
            parts += self._said(self._space)
        return parts

    def _parts(self, segments: list[tuple[str, str]]) -> list[Part]:
        """The first segment goes on with the state before; each other begins behind a marker."""
        parts: list[Part] = []
        for n, (state, text) in enumerate(segments):
            if n:
                parts += self._turned(state)
            if state == _CALL and self._call is not None:
                parts += self._call.add(text)
            else:
                parts += self._spoken(text)
        return parts

    def _turned(self, state: str) -> list[Part]:
        left, self._now = self._now, state
        if self._tools or _CALL not in (left, state):
            parts = self._end_call(cut=False) if self._call else []
            self._space, self._fresh = "", True
            self._call = _Call(self.num_calls) if state == _CALL else None
            return parts
        return self._spoken(self._around[state != _CALL])  # of no tool that we know: words

    def _spoken(self, text: str) -> list[Part]:
        text = self._space + text
        self._space = ""
        if self._fresh:
            text = text.lstrip()
        said = text.rstrip()
        self._space = text[len(said) :]
        return self._said(said)

    def _said(self, text: str) -> list[Part]:
        if not text:
            return []
        self._fresh = False
        return [Thought(text) if self._now == _THOUGHT else Words(text)]

    def _end_call(self, *, cut: bool) -> list[Part]:
        call, self._call = self._call, None
        assert call is not None
        if call.begun:
            self.num_calls += 1
            return []
        found = self._parsed(call.text)
        if found:
            self.num_calls += len(found)
            return _whole(call.number, found)
        start, end = self._around
        return [Words(start + call.text + ("" if cut else end))] if call.text or not cut else []

    def _parsed(self, text: str) -> list[dict[str, Any]]:
        """mlx-lm's parsers raise whatever comes to them of text that is no call."""
        assert self._parser is not None
        try:
            found = self._parser(text, self._tools)
        except Exception:  # it stays words
            return []
        calls = found if isinstance(found, list) else [found]
        named = all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in calls)
        return calls if named else []


class _Call:
    """The text of one.  Of {"name": …, "arguments": {…}} the arguments are passed on as they come;
    other forms are read when they are whole."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.text = ""
        self.begun = False
        self._scan: _Object | None = None

    def add(self, text: str) -> list[Part]:
        if self._scan is not None:
            return self._arguments(self._scan.add(text))
        self.text += text
        head = _JSON_CALL.match(self.text)
        name = _name(head[1]) if head else None
        if head is None or name is None:
            return []
        self.begun = True
        self._scan = _Object()
        begins = CallBegins(self.number, _call_id(), name)
        return [begins, *self._arguments(self._scan.add(self.text[head.end() :]))]

    def _arguments(self, text: str) -> list[Part]:
        return [CallArguments(self.number, text)] if text else []


class _Object:
    """Finds the end of a JSON object in text that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._over = False

    def add(self, text: str) -> str:
        """-> what of it belongs to the object."""
        for i, char in enumerate(text):
            if self._over:
                return text[:i]
            self._see(char)
        return text

    def _see(self, char: str) -> None:
        if self._in_string:
            self._in_string = self._escaped or char != '"'
            self._escaped = char == "\\" and not self._escaped
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self._over = self._depth == 0


def _whole(first: int, found: list[dict[str, Any]]) -> list[Part]:
    parts: list[Part] = []
    for number, call in enumerate(found, first):
        arguments = call.get("arguments", {})
        told = (
            arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        )
        parts.append(CallBegins(number, str(call.get("id") or _call_id()), call["name"]))
        parts.append(CallArguments(number, told))
    return parts


def _name(quoted: str) -> str | None:
    try:
        return str(json.loads(quoted))
    except ValueError:
        return None


def _call_id() -> str:
    return f"call_{uuid4().hex[:24]}"
