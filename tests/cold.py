"""Answers with their figures, and a server that has forgotten each one before the next."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.process import Server

NAME = "cold"
Messages = list[dict[str, Any]]


def asked(messages: Messages, **fields: object) -> dict[str, Any]:
    """A request for the most likely answer."""
    return {"messages": messages, "temperature": 0, "max_tokens": 24, **fields}


@dataclass(frozen=True)
class Answer:
    message: dict[str, Any]
    prompt: int
    cached: int
    completion: int

    @property
    def text(self) -> str:
        return str(self.message["content"])

    @classmethod
    def of(cls, server: Server, messages: Messages, agent: str, **fields: object) -> "Answer":
        response = server.post(asked(messages, **fields), **{"X-Agent-ID": agent})
        assert response.status_code == 200, response.text
        told: dict[str, Any] = response.json()
        usage = told["usage"]
        return cls(
            told["choices"][0]["message"],
            usage["prompt_tokens"],
            usage["prompt_tokens_details"]["cached_tokens"],
            usage["completion_tokens"],
        )


class Cold:
    def __init__(self, server: Server) -> None:
        self._server = server

    def answer(self, messages: Messages, **fields: object) -> Answer:
        """As of a server that has never been asked anything."""
        answer = Answer.of(self._server, messages, NAME, **fields)
        assert answer.cached == 0
        self._server.wait_until(self._removed)  # it is told first and remembered then
        self._server.wait_until(self._is_empty)
        return answer

    def _removed(self) -> bool:
        return self._server.delete(f"/v1/agents/{NAME}").status_code == 204

    def _is_empty(self) -> bool:
        return self._server.metric("pool_bytes") == self._server.metric("disk_bytes") == 0


ColdOf = Callable[[int | None], Cold]
"""By how many bits it keeps."""
