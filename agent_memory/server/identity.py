"""Whose request is it, and who waits for it?  From what clients send of their own accord.

Content decides what is reused; the name decides only who owns it.  Nothing is guessed from the
prompt.  Pure; any thread.
"""

import json
import re
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any

from agent_memory.errors import BadRequest
from agent_memory.request import Priority

PRIORITY = "x-priority"
EXPLICIT = "x-agent-id"
HEADERS = (
    "x-session-id",
    "x-claude-code-session-id",
    "session-id",
    "session_id",
    "x-session-affinity",
    "thread-id",
    "x-opencode-session",
)
_NAME = re.compile(r"[A-Za-z0-9._:@-]{1,200}")
_SESSION = re.compile(r"user_.*_session_([0-9a-fA-F-]{36})")


def is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None and text not in (".", "..")


def checked_name(text: str, place: str) -> str:
    """Raises BadRequest if `text` is no agent id."""
    if is_name(text):
        return text
    raise BadRequest(
        f"{place} is not an agent id: 1 to 200 of A-Z a-z 0-9 . _ : @ - and neither . nor ..",
        param=place,
        code="invalid_agent_id",
    )


def name_for(text: str) -> str:
    """Any text as a name: itself if it is one, else its hash."""
    raw = text.encode("utf-8", "surrogatepass")  # JSON within a string may hold half a pair
    return text if is_name(text) else f"x-{blake2b(raw, digest_size=16).hexdigest()}"


def agent_of(headers: Mapping[str, str], body: Mapping[str, Any]) -> str | None:
    """The agent's name, or None for anonymous.  `headers` by lower-case name.

    Only a bad X-Agent-ID is an error, a BadRequest: who sends it means us.
    """
    if EXPLICIT in headers:
        return checked_name(headers[EXPLICIT], "X-Agent-ID")
    return next((name_for(text) for text in _candidates(headers, body) if text), None)


def priority_of(headers: Mapping[str, str], body: Mapping[str, Any]) -> Priority:
    """The header's, else the body's; who says nothing is interactive.  Raises BadRequest."""
    if PRIORITY in headers:
        return _priority(headers[PRIORITY], "X-Priority")
    value = body.get("priority")
    return Priority.INTERACTIVE if value is None else _priority(value, "priority")


def _priority(value: object, place: str) -> Priority:
    if isinstance(value, str) and value in list(Priority):
        return Priority(value)
    raise BadRequest(f"'{place}' must be one of {', '.join(Priority)}.", param=place)


def _candidates(headers: Mapping[str, str], body: Mapping[str, Any]) -> Iterator[str]:
    for name in HEADERS:
        yield headers.get(name, "")
    yield _text(body.get("prompt_cache_key"))
    metadata = body.get("metadata")
    if isinstance(metadata, dict):
        yield _session_part(_text(metadata.get("user_id")))
    yield _text(body.get("user"))


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _session_part(user_id: str) -> str:
    """Claude Code puts user, account and session into one string; in others the whole counts."""
    if user_id.startswith("{"):
        return _session_in_json(user_id) or user_id
    found = _SESSION.fullmatch(user_id)
    return found[1] if found else user_id


def _session_in_json(text: str) -> str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    return _text(value.get("session_id")) if isinstance(value, dict) else ""
