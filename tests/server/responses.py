"""Requests of the Responses API, read."""

from typing import Any

from agent_memory.request import Conversation
from agent_memory.server.responses import ResponseRequest, parse


def asked(**fields: Any) -> ResponseRequest:
    return parse({"input": "Hello", **fields}, {})


def told(request: ResponseRequest, before: list[dict[str, Any]] | None = None) -> Conversation:
    """What the template is given."""
    prompt = request.ask_after(before or [], request.items).prompt
    assert isinstance(prompt, Conversation)
    return prompt


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}
