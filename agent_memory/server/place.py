"""Which words of a request a token of its prompt is: the field, and the text around.

Knows how a rendered prompt lines up with its messages: each content is found in it, in order; what
lies between is the template's.  Pure; a worker thread, for it renders and encodes a whole prompt.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from agent_memory.engine.explain import tool_name, where_defined
from agent_memory.errors import RequestError
from agent_memory.model.tokenizer import ChatTokenizer
from agent_memory.request import Conversation

AROUND = 40
"""Characters shown before and after."""
_TOKENS_AROUND = 64
TEMPLATE = "template"

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]
Field = tuple[int, int, str]
"""(first character, the one after the last, name)"""


def find(
    tokenizer: ChatTokenizer, said: Conversation, tokens: list[int], position: int
) -> dict[str, Any]:
    """`field` None: the template makes another prompt of it by now, it had the time in it."""
    rendered = _rendered(tokenizer, said, tokens)
    if rendered is None:
        before, after = tokens[:position][-_TOKENS_AROUND:], tokens[position:][:_TOKENS_AROUND]
        return {
            "field": None,
            "character": None,
            "before": tokenizer.decode(before)[-AROUND:],
            "prompt": tokenizer.decode(after)[:AROUND],
        }
    text, starts = rendered
    at = starts[position]
    name, within = locate(text, at, said.messages, said.tools)
    return {
        "field": name,
        "character": within,
        "before": text[max(0, at - AROUND) : at],
        "prompt": text[at : at + AROUND],
    }


def _rendered(
    tokenizer: ChatTokenizer, said: Conversation, tokens: list[int]
) -> tuple[str, list[int]] | None:
    """The prompt's text and where in it each token starts."""
    try:
        text = tokenizer.render(said)
    except RequestError:
        return None
    starts = tokenizer.starts(text)
    if [token for token, _ in starts] != tokens:
        return None
    return text, [start for _, start in starts]


def locate(text: str, at: int, messages: Messages, tools: Tools) -> tuple[str, int]:
    """The field that character `at` of a rendered prompt is in, and how far in.

    Right behind a content is still in it: there is where a longer one would have gone on.
    """
    contents = list(_contents(text, messages))
    for start, end, name in (*contents, *_tools(text, tools, contents)):
        if start <= at <= end:
            return name, at - start
    return TEMPLATE, at


def _contents(text: str, messages: Messages) -> Iterator[Field]:
    cursor = 0
    for i, message in enumerate(messages):
        whole = str(message.get("content") or "")
        for content in (whole, whole.strip()):  # templates like to strip
            start = text.find(content, cursor)
            if content and start >= 0:
                cursor = start + len(content)
                yield start, cursor, f"messages[{i}].content"
                break


def _tools(text: str, tools: Tools, contents: list[Field]) -> Iterator[Field]:
    """Each from its name to that of the next; the last to the next content."""
    names = [tool_name(tool) for tool in tools]
    places = where_defined({name for name in names if name}, text)
    found = sorted((places[name], i) for i, name in enumerate(names) if name in places)
    for n, (start, i) in enumerate(found):
        following = [other for other, _ in found[n + 1 : n + 2]]
        following += [other for other, _, _ in contents if other > start]
        yield start, min(following, default=len(text)) - 1, f"tools[{i}]"


def excerpt(tokenizer: ChatTokenizer, before: list[int], ahead: list[int]) -> str | None:
    """How `ahead` reads right after `before`; None if it is empty."""
    if not ahead:
        return None
    lead = before[-_TOKENS_AROUND:]
    known = tokenizer.decode(lead)
    return tokenizer.decode(lead + ahead[:_TOKENS_AROUND])[len(known) :][:AROUND]
