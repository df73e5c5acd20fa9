"""A conversation and its tools as Anthropic has them, made into what templates are written for.

    system, and messages of the role system that begin `messages`  ─►  one system message
    messages of the role system further on                         ─►  a user's, in <system> marks
    a user's message with tool results                             ─►  tool messages, then its text
    neighbours of one role                                         ─►  one message

All stays where it was said: templates want a system message first, but what comes late must not go
there, or the prompt would begin otherwise at each turn and nothing behind be remembered.  Pure; any
thread.  Whatever is wrong is a BadRequest.
"""

from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from typing import Any

from agent_memory.errors import BadRequest
from agent_memory.model.forms import Tool
from agent_memory.server.ask import Calls
from agent_memory.server.body import Fields
from agent_memory.server.tools import called_by_name, check_names, tool_name

ROLES = ("user", "assistant", "system")
BLOCKS = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
    "system": ("text",),
}
CHOICES = ("auto", "any", "tool", "none")
NO_PROMPT = "x-anthropic-billing-header:"
"""What Claude Code begins its system prompt with is no part of it, and new with each request."""

Message = dict[str, Any]


def messages(body: Fields) -> list[Message]:
    items = body.each("messages")
    if not items:
        body.refuse("messages", "a list of at least one message")
    told = _system(body)
    names: dict[str, str] = {}  # of the tools called, by the call's id
    first = True  # only the system has spoken
    for item in items:
        told += _told(item, names, first=first)
        first = first and told[-1]["role"] == "system"
    return [_one(same) for same in _neighbours(told)]


def goes_on(body: Fields, told: list[Message]) -> bool:
    """Whether the answer is to go on with the last message."""
    last = told[-1]
    if last["role"] != "assistant":
        return False
    place = f"messages[{len(body.get('messages')) - 1}]"
    if "tool_calls" in last:
        body.refuse(place, "followed by the results of its tools")
    if not last["content"] or last["content"][-1].isspace():
        body.refuse(f"{place}.content", "text that does not end with white space, to go on with it")
    return True


def _system(body: Fields) -> list[Message]:
    if body.get("system") is None:
        return []
    texts = [text for text in _texts(_blocks(body, "system")) if not text.startswith(NO_PROMPT)]
    return [{"role": "system", "content": "\n".join(texts)}] if texts else []


def _told(message: Fields, names: dict[str, str], *, first: bool) -> list[Message]:
    role = message.choice("role", ROLES) or message.refuse("role", "one of " + ", ".join(ROLES))
    blocks = _blocks(message, "content", role)
    if not blocks and role != "assistant":
        message.refuse("content", "a string or a list of at least one block")
    if role == "assistant":
        return [_said_before(blocks, names)]
    text = "\n".join(_texts(blocks))
    if role == "system":
        late = {"role": "user", "content": f"<system>\n{text}\n</system>"}
        return [{"role": "system", "content": text} if first else late]
    results = [_result(block, names) for block in blocks if block.get("type") == "tool_result"]
    return [*results, *([{"role": "user", "content": text}] if text or not results else [])]


def _blocks(message: Fields, name: str, role: str = "system") -> list[Fields]:
    """A string is one of text."""
    value = message.get(name)
    if isinstance(value, str):
        return [Fields({"type": "text", "text": value}, message.place(name))]
    if not isinstance(value, list):
        message.refuse(name, "a string or a list of blocks")
    blocks = message.each(name)
    for block in blocks:
        _check_kind(block, BLOCKS[role])
    return blocks


def _check_kind(block: Fields, known: tuple[str, ...]) -> None:
    kind, place = block.text("type"), block.place("type")
    if kind not in known:
        raise BadRequest(
            f"'{place}' is '{kind}', and this server reads only text: here {', '.join(known)}.",
            param=place,
        )


def _texts(blocks: list[Fields]) -> list[str]:
    return [_text(block, "text") for block in blocks if block.get("type") == "text"]


def _text(block: Fields, name: str) -> str:
    text = block.text(name)
    return block.refuse(name, "a string") if text is None else text


def _said_before(blocks: list[Fields], names: dict[str, str]) -> Message:
    """Thoughts that nobody can read are left out."""
    told: Message = {"role": "assistant", "content": "\n".join(_texts(blocks))}
    kinds = [block.get("type") for block in blocks]
    thoughts = [
        _text(b, "thinking") for b, kind in zip(blocks, kinds, strict=True) if kind == "thinking"
    ]
    if any(thoughts):
        told["reasoning_content"] = "\n".join(thoughts)
    if "tool_use" in kinds:
        told["tool_calls"] = [_call(b, names) for b in blocks if b.get("type") == "tool_use"]
    return told


def _call(block: Fields, names: dict[str, str]) -> Message:
    call_id, name = _text(block, "id"), _text(block, "name")
    if not isinstance(block.get("input"), dict):
        block.refuse("input", "an object")
    names[call_id] = name
    function = {"name": name, "arguments": block.get("input")}
    return {"id": call_id, "type": "function", "function": function}


def _result(block: Fields, names: dict[str, str]) -> Message:
    call_id = _text(block, "tool_use_id")
    told = "\n".join(_texts(_blocks(block, "content"))) if block.get("content") is not None else ""
    failed = "Error: " if block.flag("is_error") else ""
    named = {"name": names[call_id]} if call_id in names else {}
    return {"role": "tool", "content": failed + told, "tool_call_id": call_id, **named}


def _neighbours(told: list[Message]) -> Iterator[list[Message]]:
    """What one role said in a row; each result by itself."""
    for role, said in groupby(told, itemgetter("role")):
        same = list(said)
        yield from [[one] for one in same] if role == "tool" else [same]


def _one(same: list[Message]) -> Message:
    """All at once: one after the other would copy the text each time."""
    one = dict(same[0])
    for name in ("content", "reasoning_content"):
        if texts := [message[name] for message in same if message.get(name)]:
            one[name] = "\n".join(texts)
    if calls := [call for message in same for call in message.get("tool_calls", ())]:
        one["tool_calls"] = calls
    return one


# ── tools ────────────────────────────────────────────────────────────────────────────────────


def tools_and_calls(body: Fields) -> tuple[list[Message], Calls]:
    """With "none" the template still has the tools, so that the memory before them holds."""
    items = body.each("tools")
    tools = [_tool(tool) for tool in items]
    check_names(body, [tool.name for tool in tools])
    given = [_given(fields, tool) for fields, tool in zip(items, tools, strict=True)]
    return given, _calls(body, tools)


def _tool(fields: Fields) -> Tool:
    kind, place = fields.text("type"), fields.place("type")
    if kind not in (None, "custom"):
        raise BadRequest(
            f"'{place}' is '{kind}', a tool of Anthropic's own that this server does not have. "
            "Send only tools with an 'input_schema'.",
            param=place,
        )
    fields.text("description")
    schema = fields.get("input_schema")
    if not isinstance(schema, dict):
        fields.refuse("input_schema", "a JSON schema, which is an object")
    return Tool(tool_name(fields, "name"), schema, strict=fields.flag("strict"))


def _given(fields: Fields, tool: Tool) -> Message:
    described = fields.get("description")
    about = {} if described is None else {"description": described}
    function = {"name": tool.name, **about, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def _calls(body: Fields, tools: list[Tool]) -> Calls:
    chosen = body.below("tool_choice")
    kind, name = chosen.choice("type", CHOICES), chosen.text("name")
    several = not chosen.flag("disable_parallel_tool_use")
    match kind:
        case None if chosen:
            chosen.refuse("type", "one of " + ", ".join(CHOICES))
        case "none":
            return Calls()
        case "any" if not tools:
            chosen.refuse("type", "auto or none, for there are no tools")
        case "tool" if name not in [tool.name for tool in tools]:
            chosen.refuse("name", "that of one of the request's tools")
        case "tool":
            return called_by_name(tools, str(name))
    return Calls(tuple(tools), must=kind == "any", several=several)
