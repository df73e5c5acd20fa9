"""An answer as the Responses API has it: output items, and the events that tell of them.

The events and the whole are made by the same steps, so that they cannot differ.  Items come one
after another; the last may still be open.  Event loop.

    Words ─► message      Thought ─► reasoning      CallBegins, CallArguments ─► function_call
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

from agent_memory.errors import RequestError
from agent_memory.model.answers import CallArguments, CallBegins, Part, Thought, Words
from agent_memory.request import FinishReason
from agent_memory.server.ask import Usage
from agent_memory.server.chat import shown
from agent_memory.server.response_items import NAMES, Item, sealed
from agent_memory.server.response_tools import Offer
from agent_memory.server.turn import Piece

Event = dict[str, Any]

TEXTS = {"message": "output_text", "reasoning": "reasoning_text"}
"""Kinds of items that hold text, and the kind of their one part."""
COMPLETED, INCOMPLETE = "completed", "incomplete"


class Answer:
    """`echo`: fields of the request that come back as they are.  `seals`: thoughts come in a form
    to be sent back, too."""

    def __init__(
        self,
        own_id: str,
        model: str,
        bytes_of: Callable[[int], bytes],
        offer: Offer,
        echo: dict[str, Any],
        *,
        seals: bool,
    ) -> None:
        self._id = own_id
        self._model = model
        self._bytes_of = bytes_of
        self._offer = offer
        self._echo = echo
        self._seals = seals
        self._created = int(time.time())
        self._number = 0  # of the next event
        self._done: list[Item] = []
        self._open: Item | None = None
        self._texts: list[str] = []  # of the open item
        self._logprobs: list[dict[str, Any]] = []  # of the open item
        self._unsaid: list[dict[str, Any]] = []  # of tokens whose text is still held back
        self.stored = bool(echo["store"])

    # ── events ───────────────────────────────────────────────────────────────────────────────

    def begin(self) -> Iterator[Event]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self.response("in_progress"))

    def add(self, piece: Piece) -> Iterator[Event]:
        self._unsaid += shown(piece.logprobs, self._bytes_of)
        if not piece.parts and self._open and self._open["type"] != "message":
            self._unsaid.clear()  # a marker, or white space beside it
        for part in piece.parts:
            yield from self._said(part)

    def end(self, reason: str) -> Iterator[Event]:
        """All but the last event, which `over` makes.  There is at least one item."""
        if not self._done and self._open is None:
            yield from self._opened("message")
        status = INCOMPLETE if reason == FinishReason.LENGTH else COMPLETED
        yield from self._closed(status)

    def over(self, reason: str, usage: Usage) -> Event:
        status = INCOMPLETE if reason == FinishReason.LENGTH else COMPLETED
        return self._event(f"response.{status}", response=self.response(status, usage))

    def failed(self, error: RequestError) -> Event:
        response = self.response("failed")
        code = "invalid_prompt" if error.status < 500 else "server_error"
        response["error"] = {"code": code, "message": error.message}
        return self._event("response.failed", response=response)

    def response(self, status: str, used: Usage | None = None) -> dict[str, Any]:
        """As it stands; items that are open are not in it."""
        cut = {"reason": "max_output_tokens"} if status == INCOMPLETE else None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == COMPLETED else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": cut,
            "model": self._model,
            "output": list(self._done),
            **self._echo,
            "store": self.stored,
            "usage": None if used is None else usage(used),
        }

    # ── items ────────────────────────────────────────────────────────────────────────────────

    def _said(self, part: Part) -> Iterator[Event]:
        match part:
            case Words(text):
                yield from self._opened("message")
                logprobs, self._unsaid = self._unsaid, []
                self._logprobs += logprobs
                yield self._delta("output_text", text, content_index=0, logprobs=logprobs)
            case Thought(text):
                yield from self._opened("reasoning")
                yield self._delta("reasoning_text", text, content_index=0)
            case CallBegins(_, call_id, name):
                yield from self._closed(COMPLETED)
                call = {"call_id": call_id, **self._offer.called(name), "arguments": ""}
                yield from self._opened("function_call", **call)
            case CallArguments(_, text):
                yield self._delta("function_call_arguments", text)
        self._unsaid.clear()

    def _opened(self, kind: str, **more: Any) -> Iterator[Event]:
        """An item of that kind is open."""
        if self._open and self._open["type"] == kind:
            return
        yield from self._closed(COMPLETED)
        own_id = f"{NAMES[kind]}_{self._id.removeprefix('resp_')}_{len(self._done)}"
        self._open = {"id": own_id, "type": kind, "status": "in_progress", **more}
        if kind == "message":
            self._open |= {"role": "assistant", "content": []}
        if kind == "reasoning":
            self._open |= {"summary": [], "content": []}
        yield self._event("response.output_item.added", **self._place(), item=dict(self._open))
        if kind in TEXTS:
            yield self._of_item("content_part.added", content_index=0, part=self._part(""))

    def _closed(self, status: str) -> Iterator[Event]:
        """No item is open."""
        item = self._open
        if item is None:
            return
        text = "".join(self._texts)
        if item["type"] in TEXTS:
            yield from self._part_closed(item, text)
        else:
            item["arguments"] = text
            done = {"name": item["name"], "arguments": text}
            yield self._of_item("function_call_arguments.done", **done)
        item["status"] = status
        if item["type"] == "reasoning" and self._seals:
            item["encrypted_content"] = sealed(text)
        yield self._event("response.output_item.done", **self._place(), item=item)
        self._done.append(item)
        self._open, self._texts, self._logprobs = None, [], []

    def _part_closed(self, item: Item, text: str) -> Iterator[Event]:
        kind, part = TEXTS[item["type"]], self._part(text)
        more = {"logprobs": self._logprobs} if kind == "output_text" else {}
        yield self._of_item(f"{kind}.done", content_index=0, text=text, **more)
        yield self._of_item("content_part.done", content_index=0, part=part)
        item["content"] = [part]

    def _part(self, text: str) -> dict[str, Any]:
        assert self._open is not None
        kind = TEXTS[self._open["type"]]
        part: dict[str, Any] = {"type": kind, "text": text}
        if kind == "output_text":
            part |= {"annotations": [], "logprobs": self._logprobs if text else []}
        return part

    # ── the events' own fields ───────────────────────────────────────────────────────────────

    def _delta(self, kind: str, text: str, **more: Any) -> Event:
        self._texts.append(text)
        return self._of_item(f"{kind}.delta", delta=text, **more)

    def _of_item(self, kind: str, **more: Any) -> Event:
        assert self._open is not None
        return self._event(f"response.{kind}", item_id=self._open["id"], **self._place(), **more)

    def _place(self) -> dict[str, int]:
        return {"output_index": len(self._done)}

    def _event(self, kind: str, **more: Any) -> Event:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **more}


def usage(used: Usage) -> dict[str, Any]:
    """What of the prompt was not in memory is there now."""
    written = used.prompt_tokens - used.cached_tokens
    return {
        "input_tokens": used.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": used.cached_tokens,
            "cache_write_tokens": written,
        },
        "output_tokens": used.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": used.reasoning_tokens},
        "total_tokens": used.prompt_tokens + used.completion_tokens,
    }
