"""What crosses the line between the event loop and the engine: requests in, events out.

Plain immutable values, no behaviour.  Any thread.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from agent_memory.block import Loss
from agent_memory.errors import RequestError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """temperature 0 takes the most likely token; top_k 0, top_p 1 and min_p 0 switch each off.

    The penalties are subtracted from the logits of what has been generated so far: one for each
    time, the other once.  `logit_bias`: (token, what is added to its logit).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a chat template is given.  `messages` and `tools` as OpenAI has them, with the arguments
    of calls as objects; `options`: whatever else the template knows.  `goes_on`: the answer goes
    on with the last message, the assistant's, which has text."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    goes_on: bool = False


Prompt = Conversation | str | tuple[int, ...]
"""What a model goes on from: a conversation, text, or tokens as they are."""


class Priority(StrEnum):
    INTERACTIVE = "interactive"  # somebody waits for it
    BACKGROUND = "background"  # computed when nothing interactive wants to be


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One generation.  `max_tokens` None: until the end of turn or of the context.

    `tenant`: whose memory it is matched against and goes to; None: that of no tenant.  `agent`: as
    the store has it, see tenants.py; None is anonymous: what is computed is remembered, but nobody
    owns it.
    `stable_tokens`: so much of the prompt will surely be in the conversation's next one too; 0 if
    nobody asked.  `logprobs`: of every generated token its own and those of so many most likely
    ones; None: of none.  `prompt_logprobs`: of the prompt's tokens, too; they must be computed for
    it, so nothing is taken from memory.  `ignore_end`: the model's end of turn ends nothing.
    """

    id: str
    agent: str | None
    prompt: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    priority: Priority = Priority.INTERACTIVE
    stable_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: bool = False
    ignore_end: bool = False
    tenant: str | None = None


class FinishReason(StrEnum):
    STOP = "stop"  # end of turn, or a stop string
    LENGTH = "length"  # max_tokens, or the context is full
    CANCELLED = "cancelled"  # the client went away
    SHUTDOWN = "shutdown"  # the server ended before the answer did


class Finding(StrEnum):
    """What was found where a prompt's memory ends."""

    WHOLE = "whole"  # nothing that was remembered could not be used
    LOST = "lost"  # the prompt goes on as what was remembered once
    OTHER_MODEL = "other_model"  # the agent is remembered, but by another model
    OWN = "own"  # the agent's own memory goes on otherwise
    OTHERS = "others"  # what others, or nobody by name, have said goes on otherwise
    NOTHING = "nothing"  # nothing begins like this
    NOT_LOOKED = "not_looked"  # the prompt is scored, so all of it must be computed


@dataclass(frozen=True, slots=True)
class Compared:
    """A prompt beside what is remembered.  `position`: its first token that was not found.
    `remembered`: token bytes of what is there instead, some thousand tokens at most.
    `went_back`: tokens before `position` that were found and must be computed all the same, for
    recurrent layers go on from checkpoints only."""

    position: int
    finding: Finding
    remembered: bytes = b""
    loss: Loss | None = None
    went_back: int = 0


@dataclass(frozen=True, slots=True)
class Started:
    """The prompt's memory is in place, computing begins.  In tokens; the tiers add up to cached.
    `restore_s`: from looking for the memory to having it."""

    prompt_tokens: int
    cached_tokens: int
    from_memory: int
    from_disk: int
    restore_s: float
    compared: Compared


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, the natural logarithm of its probability as the model computed it, before bias,
    penalties, temperature and grammar, and the most likely tokens at its place with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Scored:
    """Of the prompt's tokens from its second on, in pieces and in order, before any Delta."""

    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """Text that is final.  `num_tokens` counts the tokens generated so far.  `logprobs`: of the
    tokens since the last Delta, if they were asked for, whatever of their text is held back."""

    text: str
    num_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """Always the last event, or `Failed` is.  `stop`: the stop string that ended it, if one did."""

    reason: FinishReason
    completion_tokens: int
    stop: str | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    error: RequestError


Event = Started | Scored | Delta | Finished | Failed
