"""Items, which the Responses API makes conversations of: read, kept, and told to the model.

An item that was read is in one form, the one it is kept in and listed in.  Knows nothing of where
it is kept.  Pure; any thread.  Whatever is wrong is a BadRequest.
"""

import base64
from collections.abc import Callable, Iterable
from typing import Any

from agent_memory.server.body import Fields
from agent_memory.server.messages import called, text_of, texts_of
from agent_memory.server.tools import tool_name

Item = dict[str, Any]

REFERENCE = "item_reference"
NAMES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}
"""What the id of each kind of item begins with."""
_ROLES = ("user", "assistant", "system", "developer")
_SEAL = "am1."


# ── read ─────────────────────────────────────────────────────────────────────────────────────────


def read(body: Fields) -> list[Item]:
    """The field `input`."""
    value = body.get("input")
    if isinstance(value, str):
        return [_message("user", [value])]
    if not isinstance(value, list) or not value:
        body.refuse("input", "a string or a list of at least one item")
    return [_item(item) for item in body.each("input")]


def _item(fields: Fields) -> Item:
    kind = fields.text("type") or ("message" if fields.get("role") is not None else REFERENCE)
    reader = _READERS.get(kind)
    if reader is None:
        fields.refuse("type", "one of " + ", ".join(_READERS))
    item = reader(fields)
    own_id = fields.text("id")
    return {"id": own_id, **item} if own_id else item


def _read_message(fields: Fields) -> Item:
    role = fields.choice("role", _ROLES) or fields.refuse("role", "one of " + ", ".join(_ROLES))
    return _message(role, texts_of(fields, "content"))


def _message(role: str, texts: list[str]) -> Item:
    return {"type": "message", "role": role, "content": [_part(role, text) for text in texts]}


def _part(role: str, text: str) -> dict[str, Any]:
    if role == "assistant":
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "input_text", "text": text}


def _read_call(fields: Fields) -> Item:
    call = {
        "type": "function_call",
        "call_id": _required(fields, "call_id"),
        "name": tool_name(fields, "name"),
        "arguments": fields.text("arguments") or "",
    }
    namespace = fields.text("namespace")
    return {**call, "namespace": namespace} if namespace else call


def _read_output(fields: Fields) -> Item:
    return {
        "type": "function_call_output",
        "call_id": _required(fields, "call_id"),
        "output": text_of(fields, "output"),
    }


def _read_reasoning(fields: Fields) -> Item:
    item: Item = {"type": "reasoning"}
    for name, kind in (("summary", "summary_text"), ("content", "reasoning_text")):
        texts = [_required(part, "text") for part in fields.each(name)]
        item[name] = [{"type": kind, "text": text} for text in texts]
    sealed = fields.text("encrypted_content")
    return {**item, "encrypted_content": sealed} if sealed else item


def _read_reference(fields: Fields) -> Item:
    return {"type": REFERENCE, "id": _required(fields, "id")}


def _required(fields: Fields, name: str) -> str:
    value = fields.text(name)
    return fields.refuse(name, "a string") if value is None else value


_READERS: dict[str, Callable[[Fields], Item]] = {
    "message": _read_message,
    "function_call": _read_call,
    "function_call_output": _read_output,
    "reasoning": _read_reasoning,
    REFERENCE: _read_reference,
}


# ── kept ─────────────────────────────────────────────────────────────────────────────────────────


def named(items: Iterable[Item], answer: str) -> list[Item]:
    """As they are listed.  What has no id of its own gets one that says which answer it was for."""
    return [
        {"id": f"{NAMES[item['type']]}_{answer}_i{n}", **item, "status": "completed"}
        for n, item in enumerate(items)
    ]


def answer_of(item_id: str) -> str:
    """Which answer an item that we named belongs to; what else it may be is no id."""
    return item_id.partition("_")[2].partition("_")[0]


def sealed(text: str) -> str:
    """Text as `encrypted_content`: it comes back as it was and hides nothing."""
    return _SEAL + base64.b64encode(text.encode()).decode()


def opened(content: str) -> str | None:
    """None if it is not ours."""
    if not content.startswith(_SEAL):
        return None
    try:
        return base64.b64decode(content.removeprefix(_SEAL), validate=True).decode()
    except ValueError:
        return None


# ── told ─────────────────────────────────────────────────────────────────────────────────────────


def told_name(namespace: str | None, name: str) -> str:
    """A function's name as the model hears it."""
    return f"{namespace}__{name}" if namespace else name


def messages(items: Iterable[Item]) -> list[dict[str, Any]]:
    """What templates are written for, which want one system message, at the beginning, and then
    turns.  So what follows each other of one side is one message; system messages further on are
    the user's, and stay in their place, for moved to the front they would spoil all memory."""
    told: list[list[dict[str, Any]]] = []  # what is one message, in a list
    names: dict[str, str] = {}  # of the functions called, by the call's id
    before = ""
    for item in items:
        message = _told(item, names)
        if message["role"] == "system" and any(other["role"] != "system" for other, *_ in told):
            message["role"] = "user"
        said_again = before == item["type"] == "message" and message["role"] == "assistant"
        if told and _same_side(told[-1][0], message) and not said_again:
            told[-1].append(message)
        else:
            told.append([message])
        before = item["type"]
    return [_one(same) for same in told]


def _told(item: Item, names: dict[str, str]) -> dict[str, Any]:
    match item["type"]:
        case "function_call":
            name = told_name(item.get("namespace"), item["name"])
            names[item["call_id"]] = name
            call = called(item["call_id"], name, item["arguments"])
            return {"role": "assistant", "content": "", "tool_calls": [call]}
        case "function_call_output":
            told = {"role": "tool", "content": item["output"], "tool_call_id": item["call_id"]}
            name = names.get(item["call_id"], "")
            return {**told, "name": name} if name else told
        case "reasoning":
            return {"role": "assistant", "content": "", "reasoning_content": _thought(item)}
    role = "system" if item["role"] == "developer" else item["role"]
    return {"role": role, "content": "".join(part["text"] for part in item["content"])}


def _thought(item: Item) -> str:
    """As the model had it, if that came back; else what was shown of it."""
    own = opened(item.get("encrypted_content", ""))
    shown = item["content"] or item["summary"]
    return "\n".join(part["text"] for part in shown) if own is None else own


def _same_side(before: dict[str, Any], message: dict[str, Any]) -> bool:
    return bool(before["role"] == message["role"] != "tool")


def _one(same: list[dict[str, Any]]) -> dict[str, Any]:
    """All at once: one after the other would copy the text each time."""
    one = dict(same[0])
    between = "" if one["role"] == "assistant" else "\n\n"
    one["content"] = between.join(message["content"] for message in same)
    if thoughts := [m["reasoning_content"] for m in same if "reasoning_content" in m]:
        one["reasoning_content"] = "".join(thoughts)
    if calls := [call for message in same for call in message.get("tool_calls", ())]:
        one["tool_calls"] = calls
    return one
