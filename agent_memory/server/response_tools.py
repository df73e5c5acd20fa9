"""Tools as the Responses API has them: what the template is given, and what the answer may call.

Pure; any thread.  Whatever is wrong is a BadRequest.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from agent_memory.model.forms import Tool
from agent_memory.server.ask import Calls
from agent_memory.server.body import Fields
from agent_memory.server.response_items import told_name
from agent_memory.server.tools import (
    MAX_TOOLS,
    called_by_name,
    called_by_word,
    described,
    several,
    tool_name,
    word_chosen,
)

IGNORED = ("image_generation", "tool_search", "web_search")
"""The beginnings of kinds of tools that agents offer by habit and that OpenAI runs itself.  The
model does not hear of them, so it never calls one."""
_TOLD = ("description", "parameters", "strict")


@dataclass(frozen=True, slots=True)
class Offer:
    """`given`: what the template is given.  `names`: (namespace, name) of the functions that the
    model hears of by another name."""

    given: list[dict[str, Any]] = field(default_factory=list)
    calls: Calls = Calls()
    names: dict[str, tuple[str, str]] = field(default_factory=dict)

    def called(self, name: str) -> dict[str, str]:
        """A function's name as the client knows it."""
        if name not in self.names:
            return {"name": name}
        namespace, own = self.names[name]
        return {"name": own, "namespace": namespace}


def offered(body: Fields) -> Offer:
    """With "none", and if only some of the tools must be called, the template still has them all,
    so that the memory before them holds.  If only some may be called it has just those."""
    tools: list[Tool] = []
    given: list[dict[str, Any]] = []
    names: dict[str, tuple[str, str]] = {}
    for namespace, function in _functions(body):
        if len(tools) == MAX_TOOLS:  # before more names are compared
            body.refuse("tools", f"a list of at most {MAX_TOOLS}")
        tool = described(function)
        name = told_name(namespace, tool.name)
        if name in [other.name for other in tools]:
            function.refuse("name", f"another than those before it, and '{name}' is one of them")
        if namespace:
            names[name] = (namespace, tool.name)
        tools.append(Tool(name, tool.parameters, tool.strict))
        told = {key: function.get(key) for key in _TOLD if function.get(key) is not None}
        given.append({"type": "function", "function": {"name": name, **told}})
    calls, alone = _calls(body, tools)
    if alone:
        allowed = [tool.name for tool in calls.tools]
        given = [tool for tool in given if tool["function"]["name"] in allowed]
    return Offer(given, calls, names)


def _functions(body: Fields) -> Iterator[tuple[str | None, Fields]]:
    """With the namespace of each."""
    for tool in body.each("tools"):
        match tool.text("type"):
            case "function":
                yield None, tool
            case "namespace":
                namespace = tool_name(tool, "name")
                for inner in tool.each("tools"):
                    if inner.text("type") != "function":
                        inner.refuse("type", "'function'")
                    yield namespace, inner
            case kind if kind is None or not kind.startswith(IGNORED):
                tool.refuse("type", "function or namespace: this server runs no tools itself")


def _calls(body: Fields, tools: list[Tool]) -> tuple[Calls, bool]:
    """And whether the model must not hear of other tools than these."""
    word = word_chosen(body, bool(tools))
    if word is not None:
        return called_by_word(tools, word, several=several(body)), False
    choice = body.below("tool_choice")
    match choice.get("type"):
        case "function":
            return called_by_name(tools, _known(choice, tools)), False
        case "allowed_tools":
            mode = choice.choice("mode", ("auto", "required")) or "auto"
            listed = [each for each in choice.each("tools") if _is_function(each)]
            names = [_known(each, tools) for each in listed]
            if mode == "required" and not names:
                choice.refuse("tools", "a list of at least one function")
            allowed = [tool for tool in tools if tool.name in names]
            return called_by_word(allowed, mode, several=several(body)), mode == "auto"
    choice.refuse("type", "function or allowed_tools")


def _is_function(listed: Fields) -> bool:
    kind = listed.text("type")
    if kind is None or not (kind == "function" or kind.startswith(IGNORED)):
        listed.refuse("type", "'function'")
    return kind == "function"


def _known(choice: Fields, tools: list[Tool]) -> str:
    name = told_name(choice.text("namespace"), choice.text("name") or "")
    if name not in [tool.name for tool in tools]:
        choice.refuse("name", "the name of one of the request's tools")
    return name
