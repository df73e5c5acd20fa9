"""A chat's messages as OpenAI has them, made into what templates are written for.

Pure; any thread.  Whatever is wrong is a BadRequest.
"""

import json
from typing import Any

from agent_memory.errors import BadRequest, UnsupportedParameter
from agent_memory.server.body import Fields
from agent_memory.server.tools import tool_name

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
SAID = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Kinds of content parts that are text, and the field that it is in."""


def messages(body: Fields) -> list[dict[str, Any]]:
    items = body.each("messages")
    if not items:
        body.refuse("messages", "a list of at least one message")
    names: dict[str, str] = {}  # of the functions called, by the call's id
    return [_message(message, names) for message in items]


def _message(message: Fields, names: dict[str, str]) -> dict[str, Any]:
    role = message.choice("role", ROLES) or message.refuse("role", "one of " + ", ".join(ROLES))
    for other in ("audio", "function_call"):
        if message.get(other) is not None:
            raise UnsupportedParameter(message.place(other))
    if role == "assistant":
        return _said_before(message, names)
    told: dict[str, Any] = {"role": ROLES[role], "content": text_of(message, "content")}
    if role == "tool":
        call = message.text("tool_call_id") or ""
        told["tool_call_id"] = call
        if name := names.get(call) or message.text("name"):
            told["name"] = name
    return told


def _said_before(message: Fields, names: dict[str, str]) -> dict[str, Any]:
    calls = [_call(call, names) for call in message.each("tool_calls")]
    empty = message.get("content") is None
    if empty and not calls and message.get("refusal") is None:
        message.refuse("content", "a string or a list of text parts")
    told: dict[str, Any] = {
        "role": "assistant",
        "content": (message.text("refusal") or "") if empty else text_of(message, "content"),
    }
    if thought := message.text("reasoning_content") or message.text("reasoning"):
        told["reasoning_content"] = thought
    if calls:
        told["tool_calls"] = calls
    return told


def _call(call: Fields, names: dict[str, str]) -> dict[str, Any]:
    function = call.below("function")
    name, call_id = tool_name(function, "name"), call.text("id") or ""
    names[call_id] = name
    return called(call_id, name, function.text("arguments") or "")


def called(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """A call as templates take it.  Arguments that are no JSON are what the model wrote: its own
    words are not refused."""
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        value = arguments
    function = {"name": name, "arguments": value}
    return {"id": call_id, "type": "function", "function": function}


def text_of(message: Fields, name: str) -> str:
    """A string, or the text parts of a list, joined."""
    return "".join(texts_of(message, name))


def texts_of(message: Fields, name: str) -> list[str]:
    value = message.get(name)
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        message.refuse(name, "a string or a list of text parts")
    return [_part(part) for part in message.each(name)]


def _part(part: Fields) -> str:
    kind = part.get("type")
    field = SAID.get(kind) if isinstance(kind, str) else None
    if field is None:
        place = part.place("type")
        raise BadRequest(f"'{place}' is not text, and this server reads only text.", param=place)
    text = part.text(field)
    return part.refuse(field, "a string") if text is None else text
