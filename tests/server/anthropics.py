"""Bodies as Anthropic has them, in a few words."""

from typing import Any

from agent_memory.request import Conversation
from agent_memory.server.anthropic_messages import MessagesRequest, parse

HELLO = {"role": "user", "content": "Hello"}


def asking(*messages: object, **fields: object) -> MessagesRequest:
    return parse({"max_tokens": 9, "messages": list(messages or [HELLO]), **fields}, {})


def said(request: MessagesRequest) -> Conversation:
    assert isinstance(request.ask.prompt, Conversation)
    return request.ask.prompt


def told(*messages: object, **fields: object) -> list[dict[str, Any]]:
    return [dict(message) for message in said(asking(*messages, **fields)).messages]


def user(*blocks: object) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks: object) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


def text(words: str, **more: object) -> dict[str, Any]:
    return {"type": "text", "text": words, **more}
