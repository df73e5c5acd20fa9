"""What a request must keep to: the model's limits, the memory's, and the queue's.

Knows numbers only.  Event loop; `ModelInfo` any thread.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from agent_memory.engine.room import Cost, tokens_to_begin
from agent_memory.errors import (
    BadRequest,
    ContextLengthExceeded,
    MemoryExceeded,
    Unavailable,
)
from agent_memory.kv_spec import KVSpec
from agent_memory.request import GenerateRequest, SamplingParams

MAX_RETRY_S = 60
MAX_LOGPROBS = 20
NEWEST_SHARE = 0.1
"""Of the mean time a request takes, what the newest one counts."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the outside may know of a model that was loaded.  `made_for`: the context length its
    makers gave it; `kv`: how its KV is kept; `fixed_bytes`: what it takes itself."""

    id: str
    context_length: int
    made_for: int
    vocab_size: int
    defaults: SamplingParams
    kv: dict[str, object]
    self_test_difference: float
    spec: KVSpec
    cost: Cost
    fixed_bytes: int


def check(request: GenerateRequest, model: ModelInfo, most_tokens: int) -> int:
    """-> tokens it must have room for to begin.  `most_tokens`: the longest sequence that there is
    memory for, if all the others go.  Raises BadRequest."""
    if not request.prompt:
        raise BadRequest("The prompt is empty.", param="messages")
    if request.max_tokens is not None and request.max_tokens < 1:
        raise BadRequest("max_tokens must be at least 1.", param="max_tokens")
    if min(request.prompt) < 0 or max(request.prompt) >= model.vocab_size:
        raise BadRequest(
            f"The prompt holds token ids outside 0 to {model.vocab_size - 1}, which the "
            "model does not know.",
            param="messages",
        )
    if request.sampling.top_k > model.vocab_size:
        raise BadRequest(
            f"top_k is {request.sampling.top_k}, but the model knows only "
            f"{model.vocab_size} tokens.",
            param="top_k",
        )
    _check_tokens(request, model)
    if len(request.prompt) >= model.context_length:
        raise ContextLengthExceeded(len(request.prompt), model.context_length)
    room = model.context_length - len(request.prompt)
    tokens = tokens_to_begin(len(request.prompt), min(request.max_tokens or room, room))
    if tokens > most_tokens:
        raise MemoryExceeded(len(request.prompt), tokens, most_tokens)
    return tokens


def _check_tokens(request: GenerateRequest, model: ModelInfo) -> None:
    """What is asked of single tokens."""
    if any(not 0 <= token < model.vocab_size for token, _ in request.sampling.logit_bias):
        raise BadRequest(
            f"logit_bias names token ids outside 0 to {model.vocab_size - 1}, which the model "
            "does not know.",
            param="logit_bias",
        )
    if request.logprobs is not None and not 0 <= request.logprobs <= MAX_LOGPROBS:
        raise BadRequest(
            f"Of 0 to {MAX_LOGPROBS} most likely tokens the logprobs can be had, not of "
            f"{request.logprobs}.",
            param="logprobs",
        )


class Queue:
    """Requests that wait or run: how many there are, and for how long each keeps the next waiting.

    With n at once and s seconds for each, one ends every s / n.

    Half of the places are for whoever comes; of the others each tenant, and the owner, has as many
    as the next: so nobody can take all.
    """

    def __init__(self, max_requests: int, num_tenants: int = 1) -> None:
        """`num_tenants`: the owner counts as one."""
        self.max_requests = max_requests
        self.num_active = 0
        self._own = max_requests // (2 * num_tenants)
        self._common = max_requests - num_tenants * self._own
        self._active_of = Counter[str | None]()
        self.on_empty: Callable[[], object] = lambda: None  # called when the last one has left
        self._service_s = 0.0

    def is_full(self, tenant: str | None) -> bool:
        """For this tenant."""
        if self._active_of[tenant] < self._own:
            return False
        return sum(max(0, n - self._own) for n in self._active_of.values()) >= self._common

    def refuse_when_full(self, tenant: str | None) -> None:
        """Raises Unavailable."""
        if self.is_full(tenant):
            raise Unavailable(
                f"{self._active_of[tenant]} requests are waiting or running, which is the limit. "
                "Try again later, or raise --max-requests.",
                reason="queue_full",
                retry_after=self.retry_after_s,
            )

    def enter(self, tenant: str | None) -> None:
        self.refuse_when_full(tenant)
        self._active_of[tenant] += 1
        self.num_active += 1

    def leave(self, tenant: str | None, took_s: float) -> None:
        assert self._active_of[tenant] > 0
        self._active_of[tenant] -= 1
        newest_s = took_s / self.num_active
        share = NEWEST_SHARE if self._service_s else 1.0
        self._service_s += share * (newest_s - self._service_s)
        self.num_active -= 1
        if not self.num_active:
            self.on_empty()

    @property
    def retry_after_s(self) -> int:
        """When all that are here now will have ended: 1 to MAX_RETRY_S."""
        return max(1, min(MAX_RETRY_S, math.ceil(self.num_active * self._service_s)))
