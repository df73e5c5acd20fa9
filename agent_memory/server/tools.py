"""Tools as OpenAI's chat has them: what the template is given, and what the answer may call.

Pure; any thread.  Whatever is wrong is a BadRequest.
"""

import re
from typing import Any

from agent_memory.errors import BadRequest
from agent_memory.model.forms import Tool
from agent_memory.server.ask import Calls
from agent_memory.server.body import Fields

MAX_TOOLS = 512
CHOICES = ("none", "auto", "required")
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")


def tools_and_calls(body: Fields) -> tuple[list[dict[str, Any]], Calls]:
    """With "none" the template still has the tools, so that the memory before them holds."""
    tools = [function(tool) for tool in body.each("tools")]
    check_names(body, [tool.name for tool in tools])
    given: list[dict[str, Any]] = [
        {"type": "function", "function": tool["function"]} for tool in body.get("tools") or []
    ]
    word = word_chosen(body, bool(tools))
    if word is None:
        return given, called_by_name(tools, _name_chosen(body, tools))
    return given, called_by_word(tools, word, several=several(body))


def several(body: Fields) -> bool:
    return body.get("parallel_tool_calls") is None or body.flag("parallel_tool_calls")


def word_chosen(body: Fields, has_tools: bool) -> str | None:
    """ "none", "auto" or "required"; None: an object says more."""
    value = body.get("tool_choice")
    if value is None:
        return "auto"
    if not isinstance(value, str):
        return None
    if value not in CHOICES:
        body.refuse("tool_choice", "none, auto, required, or a function by its name")
    if value == "required" and not has_tools:
        body.refuse("tool_choice", "none or auto, for there are no tools")
    return value


def called_by_word(tools: list[Tool], word: str, *, several: bool) -> Calls:
    if word == "none":
        return Calls()
    return Calls(tuple(tools), must=word == "required", several=several)


def called_by_name(tools: list[Tool], name: str) -> Calls:
    return Calls(tuple(tool for tool in tools if tool.name == name), must=True, several=False)


def check_names(body: Fields, names: list[str]) -> None:
    if len(names) > MAX_TOOLS:
        body.refuse("tools", f"a list of at most {MAX_TOOLS}")
    for n, name in enumerate(names):
        if name in names[:n]:
            raise BadRequest(f"Two tools are named '{name}'.", param=body.place(f"tools[{n}]"))


def function(tool: Fields) -> Tool:
    if tool.get("type") != "function":
        tool.refuse("type", "'function', the only kind of tool a chat can have here")
    return described(tool.below("function"))


def described(fields: Fields) -> Tool:
    """{"name": …, "parameters": …, "strict": …}."""
    name = tool_name(fields, "name")
    fields.text("description")
    parameters = fields.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        fields.refuse("parameters", "a JSON schema, which is an object")
    return Tool(name, parameters or {}, strict=fields.flag("strict"))


def tool_name(fields: Fields, field: str) -> str:
    name = fields.text(field)
    if name is None or not _NAME.fullmatch(name):
        fields.refuse(field, "1 to 128 of A-Z a-z 0-9 _ . : / -")
    return name


def _name_chosen(body: Fields, tools: list[Tool]) -> str:
    chosen = body.below("tool_choice")
    name = chosen.below("function").text("name")
    if chosen.get("type") != "function" or name not in [tool.name for tool in tools]:
        body.refuse(
            "tool_choice", "none, auto, required, or one of the request's tools by its name"
        )
    return str(name)
