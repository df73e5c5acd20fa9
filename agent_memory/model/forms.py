"""The forms that answers can be held to, as grammars: JSON of a schema, calls of tools.

Knows llguidance's grammar language and the spacing that chat templates write JSON with, so that an
answer comes back in the next prompt as the same tokens.  Pure; any thread.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agent_memory.model.answers import CALL_END, CALL_START

ANY_OBJECT: dict[str, Any] = {"type": "object"}
_SPACING = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}


@dataclass(frozen=True, slots=True)
class Form:
    """JSON of a schema.  `strict`: what the schema says that no grammar can hold is an error."""

    schema: dict[str, Any]
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that may be called.  `parameters`: its arguments' schema."""

    name: str
    parameters: dict[str, Any]
    strict: bool = False


def grammar(form: Form | None, tools: Sequence[Tool], *, several: bool, after_thought: bool) -> str:
    """The answer is of the form, or one call of the tools, or `several`.

    At least one of the two is given.  Lines may be left empty before it `after_thought`.
    """
    assert form or tools
    ways = " | ".join((["form"] if form else []) + (["calls"] if tools else []))
    rules = (
        [f"start: SPACE? ({ways})", r"SPACE: /\n{1,2}/"] if after_thought else [f"start: {ways}"]
    )
    if form:
        rules.append(f"form: {_json(form.schema, form.strict)}")
    if tools:
        rules.append('calls: call ("\\n" call)*' if several else "calls: call")
        choices = " | ".join(f"call_{n}" for n in range(len(tools)))
        start, end = json.dumps(f"{CALL_START}\n"), json.dumps(f"\n{CALL_END}")
        rules.append(f"call: {start} ({choices}) {end}")
    for n, tool in enumerate(tools):
        head = json.dumps(f'{{"name": {json.dumps(tool.name)}, "arguments": ')
        rules.append(f'call_{n}: {head} arguments_{n} "}}"')
        rules.append(f"arguments_{n}: {_json(tool.parameters, tool.strict)}")
    return "\n".join(rules)


def _json(schema: dict[str, Any], strict: bool) -> str:
    how = {**_SPACING, "lenient": not strict, "coerce_one_of": not strict}
    return f"%json {json.dumps({**(schema or ANY_OBJECT), 'x-guidance': how}, ensure_ascii=False)}"
