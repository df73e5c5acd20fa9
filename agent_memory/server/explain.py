"""Why was it a miss?  The last requests' explanations, kept, told and looked up.

Knows what of a request must be kept to explain it later, in RAM only and bounded, and how an
explanation looks: as a header, as log fields, as JSON.  What needs the whole prompt again (which
message a token is in) is done when somebody asks, in a worker thread.  Event loop.
"""

import asyncio
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any
from weakref import ref

import structlog
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from agent_memory.block import token_bytes
from agent_memory.engine.explain import NEAR, Asked, Cause, cause_of, token_ids
from agent_memory.errors import NotFound
from agent_memory.model.tokenizer import ChatTokenizer
from agent_memory.request import Finding, Started
from agent_memory.server import place

MAX_REQUESTS = 1_000
MAX_BYTES = 64 << 20

MEANING = {
    Cause.NONE: "Everything remembered that the prompt begins with was used.",
    Cause.DATE_OR_COUNTER_CHANGED: "A date, time or number changed, and all behind it had to be "
    "computed. Put what changes at the end.",
    Cause.TOOLS_REORDERED: "The same tools came in another order. Send them in a fixed one.",
    Cause.REASONING_DROPPED: "The model's reasoning is remembered, and the template or the client "
    "left it out of the earlier answer.",
    Cause.REPLY_TOKENIZED_DIFFERENTLY: "The same text, but the model had written it in other "
    "tokens than the tokenizer makes of it.",
    Cause.PROMPT_CHANGED: "The text is another one than what is remembered.",
    Cause.OTHER_MODEL: "The agent is remembered, but under another model or other --kv-bits.",
    Cause.EVICTED: "It was remembered, and there was no room for it, or its files were removed.",
    Cause.EXPIRED: "It was remembered and not used for so long that it was deleted.",
    Cause.DAMAGED_FILE: "It was remembered, but its file was damaged and not used.",
    Cause.NEVER_SEEN: "Nothing remembered goes on like this.",
    Cause.BACK_TO_CHECKPOINT: "All of it is remembered, but the model's recurrent layers go on "
    "from checkpoints only, and the last one is further back.",
    Cause.PROMPT_SCORED: "Logprobs of the prompt were asked for, so all of it was computed.",
}

NO_WORDS = dict.fromkeys(("field", "character", "before", "prompt", "remembered"))

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Explained:
    """`tokens`: the prompt's, as bytes.  `tokenizer`: of the model that served it, which takes it
    along when it leaves memory.  `num_bytes`: what keeping it takes, roughly."""

    request_id: str
    model: str
    created: float
    asked: Asked
    tokens: bytes
    started: Started
    cause: Cause
    tokenizer: "ref[ChatTokenizer]"
    num_bytes: int

    @property
    def header(self) -> str:
        """hit, partial or miss; a full hit has no cause."""
        started, cause = self.started, f"cause={self.cause}"
        if not started.cached_tokens:
            return f"miss; {cause}" if self.cause is not Cause.NONE else "miss"
        word = "hit" if self.cause is Cause.NONE else "partial"
        tokens = f"tokens={started.cached_tokens}/{started.prompt_tokens}"
        tiers = f"ram={started.from_memory}; disk={started.from_disk}"
        return "; ".join([word, tokens, tiers, *([cause] if word == "partial" else [])])


class Explanations:
    """The latest requests, by the id of each; of two with one id the later."""

    def __init__(self, most: int = MAX_REQUESTS, most_bytes: int = MAX_BYTES) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._kept: OrderedDict[str, Explained] = OrderedDict()
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def add(
        self, request_id: str, model: str, asked: Asked, started: Started, tokenizer: ChatTokenizer
    ) -> Explained:
        """What an explanation fails at, the request must not."""
        try:
            cause = cause_of(asked, started.compared, tokenizer)
        except Exception:
            log.exception("explanation_failed", request_id=request_id)
            cause = Cause.PROMPT_CHANGED
        explained = Explained(
            request_id,
            model,
            created=time.time(),
            asked=replace(asked, tokens=()),
            tokens=token_bytes(asked.tokens),
            started=_shown(started, cause),
            cause=cause,
            tokenizer=ref(tokenizer),
            num_bytes=_num_bytes(asked),
        )
        self._keep(explained)
        return explained

    def get(self, request_id: str) -> Explained | None:
        return self._kept.get(request_id)

    def forget_agent(self, agent_id: str) -> None:
        """Its requests, and the words of others, perhaps its own, in what is kept of the rest."""
        for explained in list(self._kept.values()):
            if explained.asked.agent == agent_id:
                self._drop(explained.request_id)
            elif explained.started.compared.finding is Finding.OTHERS:
                self._keep(replace(explained, started=_without_words(explained.started)))

    def _keep(self, explained: Explained) -> None:
        self._drop(explained.request_id)
        self._kept[explained.request_id] = explained
        self._num_bytes += explained.num_bytes
        while len(self._kept) > self._most or self._num_bytes > self._most_bytes:
            self._drop(next(iter(self._kept)))

    def _drop(self, request_id: str) -> None:
        if explained := self._kept.pop(request_id, None):
            self._num_bytes -= explained.num_bytes

    def check(self) -> None:
        assert self._num_bytes == sum(kept.num_bytes for kept in self._kept.values())
        assert len(self._kept) <= self._most and self._num_bytes <= self._most_bytes


def _num_bytes(asked: Asked) -> int:
    texts = sum(sys.getsizeof(str(message)) for message in asked.said.messages)
    return texts + len(str(asked.said.tools)) + 4 * len(asked.tokens) + 4 * NEAR + 1024


def _shown(started: Started, cause: Cause) -> Started:
    """Without what nobody will be shown: above all not what a stranger said."""
    if cause is Cause.NEVER_SEEN:
        return _without_words(started)
    compared = started.compared
    return replace(started, compared=replace(compared, remembered=compared.remembered[: 4 * NEAR]))


def _without_words(started: Started) -> Started:
    return replace(started, compared=replace(started.compared, remembered=b""))


# ── looked up ────────────────────────────────────────────────────────────────────────────────


async def explain(request: Request) -> Response:
    explanations: Explanations = request.state.explanations
    request_id = request.path_params["request_id"]
    explained = explanations.get(request_id)
    if explained is None:
        raise NotFound(
            f"No request '{request_id}' is among the last {MAX_REQUESTS} that were computed. The "
            "id is in the X-Request-ID header of its answer.",
            code="request_not_found",
        )
    return JSONResponse(await asyncio.to_thread(described, explained))


def described(explained: Explained) -> dict[str, Any]:
    """Renders and reads the prompt again: of a long one in some 100 ms.  Any thread."""
    started, compared = explained.started, explained.started.compared
    return {
        "id": explained.request_id,
        "object": "request.explanation",
        "agent": explained.asked.agent,
        "model": explained.model,
        "created": round(explained.created, 3),
        "cause": str(explained.cause),
        "meaning": MEANING[explained.cause],
        "lost": compared.loss and str(compared.loss),
        "tokens": {
            "prompt": started.prompt_tokens,
            "cached": started.cached_tokens,
            "memory": started.from_memory,
            "disk": started.from_disk,
            "went_back": compared.went_back,
        },
        "restore_ms": round(1000 * started.restore_s, 3),
        "differs": _differs(explained) if explained.cause is not Cause.NONE else None,
    }


def _differs(explained: Explained) -> dict[str, Any]:
    """Where the prompt goes on without memory, and what it and the memory say there."""
    asked, tokens = explained.asked, token_ids(explained.tokens)
    compared, tokenizer = explained.started.compared, explained.tokenizer()
    if tokenizer is None:
        return {"token": compared.position, **NO_WORDS}
    found = place.find(tokenizer, asked.said, tokens, compared.position)
    ahead = token_ids(compared.remembered)
    return {
        "token": compared.position,
        **found,
        "remembered": place.excerpt(tokenizer, tokens[: compared.position], ahead),
    }
