"""Request bodies: strict JSON, and its fields by type.

Knows what JSON may hold and how to name the place of what it may not.  Knows no API.  Pure; any
thread.  Whatever is wrong is a BadRequest.
"""

import json
import math
from collections.abc import Collection, Iterator
from typing import Any, Never

from agent_memory.errors import BadRequest

MAX_DEPTH = 100


def parse(raw: bytes) -> dict[str, Any]:
    """The object that `raw` is.  No NaN or Infinity, no half of a surrogate pair, not too deep."""
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:  # not UTF-8, not JSON, or a number of thousands of digits
        raise BadRequest(f"The body is not JSON: {error}.", code="invalid_json") from error
    if not isinstance(value, dict):
        raise BadRequest("The body must be a JSON object.", code="invalid_json")
    _check_all(value)
    return value


def _refuse_constant(name: str) -> Never:
    raise ValueError(f"{name} is no JSON number")


def _too_deep() -> BadRequest:
    return BadRequest(f"The body is nested deeper than {MAX_DEPTH} levels.", code="invalid_json")


def _check_all(value: object) -> None:
    """Level by level, so that depth costs no stack."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise _too_deep()
        below: list[object] = []
        for item in level:
            if isinstance(item, str):
                _check_text(item)
            elif isinstance(item, dict):
                below += [*item.keys(), *item.values()]
            elif isinstance(item, list):
                below += item
            elif isinstance(item, float) and not math.isfinite(item):
                raise BadRequest("The body holds a number that is too large.", code="invalid_json")
        level = below


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(
            "The body holds half of a surrogate pair (\\ud800 to \\udfff), which is no character.",
            code="invalid_json",
        ) from error


class Fields:
    """The fields of an object at `place`, the empty string for the body itself.

    null means absent.  Types are strict: true is no number, 1.0 is no integer.
    """

    def __init__(self, values: dict[str, Any], place: str = "") -> None:
        self._values = values
        self._place = place

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def place(self, name: str) -> str:
        return f"{self._place}.{name}" if self._place else name

    def get(self, name: str) -> Any:
        return self._values.get(name)

    def text(self, name: str) -> str | None:
        value = self.get(name)
        return value if value is None or isinstance(value, str) else self.refuse(name, "a string")

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if value is None:
            return False
        return value if isinstance(value, bool) else self.refuse(name, "true or false")

    def integer(self, name: str, low: int, high: int | None = None) -> int | None:
        value = self.get(name)
        if value is None:
            return None
        whole = isinstance(value, int) and not isinstance(value, bool)
        if whole and low <= value and (high is None or value <= high):
            return int(value)
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        return self.refuse(name, f"an integer {limits}")

    def number(self, name: str, low: float, high: float, *, open_low: bool = False) -> float | None:
        """Within [low, high], or (low, high] with `open_low`."""
        value = self.get(name)
        if value is None:
            return None
        fits = type(value) in (int, float) and low <= value <= high
        if fits and not (open_low and value == low):
            return float(value)
        limits = f"above {low:g} and at most {high:g}" if open_low else f"from {low:g} to {high:g}"
        return self.refuse(name, f"a number {limits}")

    def items(self, name: str) -> list[Any] | None:
        value = self.get(name)
        return value if value is None or isinstance(value, list) else self.refuse(name, "a list")

    def below(self, name: str) -> "Fields":
        """The object's fields; of an absent object all are absent."""
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            self.refuse(name, "an object")
        return Fields(value or {}, self.place(name))

    def each(self, name: str) -> list["Fields"]:
        """The objects of a list; none of an absent one."""
        return [
            Fields(item, f"{self.place(name)}[{n}]")
            if isinstance(item, dict)
            else self.refuse(f"{name}[{n}]", "an object")
            for n, item in enumerate(self.items(name) or [])
        ]

    def choice(self, name: str, known: Collection[str]) -> str | None:
        """One of the `known` words."""
        value = self.text(name)
        if value is not None and value not in known:
            self.refuse(name, "one of " + ", ".join(known))
        return value

    def refuse(self, name: str, expected: str) -> Never:
        place = self.place(name)
        raise BadRequest(f"'{place}' must be {expected}.", param=place)


def known_fields(raw: bytes, *known: str) -> Fields:
    """An empty body is one without fields.  What is not known is refused: it may be misspelt."""
    values = parse(raw) if raw else {}
    for name in values.keys() - set(known):
        allowed = ", ".join(f"'{field}'" for field in known) or "no fields at all"
        raise BadRequest(f"'{name}' is not known here; allowed: {allowed}.", param=name)
    return Fields(values)
