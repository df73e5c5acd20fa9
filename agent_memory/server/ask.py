"""What a request of any API comes down to, and the fields that all of them have.

Knows neither HTTP nor the engine.  Pure; any thread.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from agent_memory.errors import BadRequest
from agent_memory.model.forms import ANY_OBJECT, Form, Tool
from agent_memory.request import Priority, Prompt, SamplingParams
from agent_memory.server.body import Fields
from agent_memory.server.identity import agent_of, priority_of

MAX_STOPS = 16
MAX_STOP_CHARS = 200
MAX_SEED = 2**63 - 1
MAX_BIASES = 1024
MAX_ID_DIGITS = 10
MAX_CHOICES = 16
MAX_LOGPROBS = 20
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
NO_EFFORT = ("none", "minimal")
OWN_WORDS = ("messages", "tools", "add_generation_prompt", "tokenize", "conversation")


@dataclass(frozen=True, slots=True)
class Calls:
    """The tools that the answer may call.  `must`: it is nothing but calls of them."""

    tools: tuple[Tool, ...] = ()
    must: bool = False
    several: bool = True


@dataclass(frozen=True, slots=True)
class Ask:
    """`model` None: whichever serves.  `effort`: how much to think, for templates that can be told.
    `sampling` holds only what the client chose.  `choices`: so many answers to one prompt.
    `logprobs`, `prompt_logprobs`, `ignore_end`: as of a GenerateRequest."""

    model: str | None
    agent: str | None
    priority: Priority
    prompt: Prompt
    effort: str | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    choices: int = 1
    logprobs: int | None = None
    prompt_logprobs: bool = False
    ignore_end: bool = False
    form: Form | None = None
    calls: Calls = Calls()

    def sampling_over(self, defaults: SamplingParams, choice: int) -> SamplingParams:
        """Of one answer; several with one seed would all be the same."""
        chosen = replace(defaults, **self.sampling)
        return chosen if chosen.seed is None else replace(chosen, seed=chosen.seed + choice)


@dataclass(frozen=True, slots=True)
class Usage:
    """In tokens; the prompt counts once, however many answers it has."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int = 0


def whose(headers: Mapping[str, str], values: Mapping[str, Any]) -> tuple[str | None, Priority]:
    """The agent and the priority.  Raises BadRequest."""
    return agent_of(headers, values), priority_of(headers, values)


def sampling(body: Fields, most_temperature: float = 2) -> dict[str, Any]:
    chosen = {
        "temperature": body.number("temperature", 0, most_temperature),
        "top_p": body.number("top_p", 0, 1, open_low=True),
        "top_k": body.integer("top_k", 0),
        "min_p": body.number("min_p", 0, 1),
        "seed": body.integer("seed", -MAX_SEED - 1, MAX_SEED - MAX_CHOICES),
        "frequency_penalty": body.number("frequency_penalty", -2, 2),
        "presence_penalty": body.number("presence_penalty", -2, 2),
        "logit_bias": _logit_bias(body),
    }
    return {name: value for name, value in chosen.items() if value is not None}


def _logit_bias(body: Fields) -> tuple[tuple[int, float], ...] | None:
    biases = body.below("logit_bias")
    are_ids = (name.isdecimal() and len(name) <= MAX_ID_DIGITS for name in biases)
    if len(biases) > MAX_BIASES or not all(are_ids):
        body.refuse("logit_bias", f"at most {MAX_BIASES} token ids, each with a number")
    found = ((int(name), biases.number(name, -100, 100)) for name in biases)
    return tuple((token, bias) for token, bias in found if bias) or None


def stops(body: Fields, name: str = "stop") -> tuple[str, ...]:
    value = body.get(name)
    found = [] if value is None else value if isinstance(value, list) else [value]
    fits = len(found) <= MAX_STOPS and all(
        isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_CHARS for stop in found
    )
    if not fits:
        body.refuse(
            name, f"a string of 1 to {MAX_STOP_CHARS} characters, or a list of up to {MAX_STOPS}"
        )
    return tuple(found)


def form(told: Fields, schema: str = "") -> Form | None:
    """What OpenAI has as a format.  `schema`: the field that describes a JSON schema; without one
    it is described beside the type."""
    match told.choice("type", ("text", "json_object", "json_schema")):
        case "json_object":
            return Form(ANY_OBJECT)
        case "json_schema":
            return form_of(told.below(schema) if schema else told)
        case None if told:
            told.refuse("type", "text, json_object or json_schema")
    return None


def form_of(schema: Fields) -> Form:
    """{"schema": …, "strict": …} as OpenAI has it."""
    below = schema.get("schema")
    if not isinstance(below, dict):
        schema.refuse("schema", "a JSON schema, which is an object")
    return Form(below, strict=schema.flag("strict"))


def options(body: Fields) -> dict[str, Any]:
    """For the template.  Templates are programs: only the model's own is run."""
    for fields in (body, body.below("chat_template_kwargs")):
        if fields.get("chat_template") is not None:
            place = fields.place("chat_template")
            raise BadRequest(
                f"'{place}' is refused: only the model's own chat template is used.", param=place
            )
    asked = body.below("chat_template_kwargs")
    for name in asked:
        if name in OWN_WORDS:
            asked.refuse(name, "absent: the server says it")
    return {name: asked.get(name) for name in asked}
