"""Responses that were kept, and the conversations that they end.

Knows what is kept of one, how long, and whose it is.  The disk is waited for in worker threads.
Event loop.
"""

import asyncio
import errno
import threading
import time
from collections import Counter
from collections.abc import Callable, Container
from typing import Any

import structlog

from agent_memory.errors import BadRequest, NotFound
from agent_memory.server.response_items import REFERENCE, Item, answer_of, named
from agent_memory.store.documents import Document, Documents, response_ids_of

MOST = 1_000
MOST_BYTES = 1 << 30
MOST_DAYS = 30
RESPONSE = "resp_"

log = structlog.get_logger(__name__)


class Responses:
    """`has_room`: whether the disk takes so many bytes more."""

    def __init__(self, documents: Documents, has_room: Callable[[int], bool]) -> None:
        self._documents = documents
        self._has_room = has_room
        self._changing = threading.Lock()
        self._forgotten: Counter[str | None] = Counter()

    def times_forgotten(self, agent: str | None) -> int:
        """What an answer is kept with, so that no removal of its agent is outlived."""
        return self._forgotten[agent]

    async def get(self, response_id: str) -> Document:
        """{"response": …, "before": […], "input": […]}.  Raises NotFound."""
        found = await asyncio.to_thread(self._read, response_id)
        if found is None:
            raise NotFound(f"Response with id '{response_id}' not found.")
        return found

    async def keep(
        self, agent: str | None, forgotten: int, response: dict[str, Any], items: list[list[Item]]
    ) -> bool:
        """On disk when this returns, unless it is False.  `items`: those of the conversation
        before, and those of this request."""
        return await asyncio.to_thread(self._keep, agent, forgotten, response, *items)

    async def delete(self, response_id: str) -> None:
        """Raises NotFound."""
        if not await asyncio.to_thread(self._documents.delete, response_id):
            raise NotFound(f"Response with id '{response_id}' not found.")

    async def forget_agent(self, agent: str) -> int:
        """-> how many it had."""
        return await asyncio.to_thread(self._forget, agent)

    async def conversation(self, response_id: str | None) -> list[Item]:
        """All that was said up to the end of a response.  Raises NotFound."""
        if response_id is None:
            return []
        found = await asyncio.to_thread(self._read, response_id)
        if found is None:
            raise NotFound(
                f"Previous response with id '{response_id}' not found. It was not stored, or is "
                "not any more: send the whole conversation as 'input'.",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        return _all_of(found)

    async def resolved(self, items: list[Item]) -> list[Item]:
        """With what they refer to in place of the references.  Each response is read once, and
        each item named once, so that a body of references is no more work than what they name.
        Raises NotFound, BadRequest."""
        named_ids = Counter(item["id"] for item in items if item["type"] == REFERENCE)
        if named_ids.total() > len(named_ids):
            [(twice, _)] = named_ids.most_common(1)
            raise BadRequest(f"Item with id '{twice}' is named twice: name it once.", param="input")
        found: dict[str, Item] = {}
        for answer in dict.fromkeys(map(answer_of, named_ids)):
            found |= await asyncio.to_thread(self._items_of, answer, named_ids)
        for item_id in named_ids:
            if item_id not in found:
                raise NotFound(
                    f"Item with id '{item_id}' not found. Items of responses with 'store': false, "
                    "and of deleted ones, are not kept: send the item itself.",
                    param="input",
                )
        return [found[item["id"]] if item["type"] == REFERENCE else item for item in items]

    # ── worker threads ───────────────────────────────────────────────────────────────────────

    def _read(self, response_id: str) -> Document | None:
        """A damaged one is as good as none."""
        try:
            return self._documents.get(response_id)
        except ValueError:
            log.warning("response_damaged", response=response_id)
            return None

    def _items_of(self, answer: str, wanted: Container[str]) -> dict[str, Item]:
        """Those of `wanted` that were named for this answer.  Of two of one name the first is."""
        document = self._read(RESPONSE + answer)
        return {
            item["id"]: item
            for item in reversed(_all_of(document) if document else [])
            if item["id"] in wanted and answer_of(item["id"]) == answer
        }

    def _keep(
        self,
        agent: str | None,
        forgotten: int,
        response: dict[str, Any],
        before: list[Item],
        items: list[Item],
    ) -> bool:
        kept_id = response["id"]
        assert kept_id.startswith(response_ids_of(agent))
        asked = named(items, kept_id.removeprefix(RESPONSE))
        document = {"response": response, "before": before, "input": asked}
        try:
            if not self._has_room(0):
                raise OSError(errno.ENOSPC, "the disk is as full as it may get")
            with self._changing:
                if self._forgotten[agent] != forgotten:
                    return False
                self._documents.put(kept_id, document)
                self._documents.trim(MOST, MOST_BYTES, time.time() - MOST_DAYS * 86400)
        except OSError as error:
            log.error("response_not_kept", response=kept_id, reason=error.strerror)
            return False
        return True

    def _forget(self, agent: str) -> int:
        with self._changing:
            self._forgotten[agent] += 1
            return len(self._documents.delete_all(response_ids_of(agent)))


def _all_of(document: Document) -> list[Item]:
    return [*document["before"], *document["input"], *document["response"]["output"]]
