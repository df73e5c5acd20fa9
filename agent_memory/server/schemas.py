"""Words for JSON schemas, and with them the bodies that the parsers take.

null means absent, so every field may be null but those that are required.  Pure; any thread.
"""

from collections.abc import Iterable
from typing import Any

from agent_memory.request import Priority
from agent_memory.server import ask, completions
from agent_memory.server.messages import ROLES
from agent_memory.server.tools import CHOICES, MAX_TOOLS

Schema = dict[str, Any]

TEXT: Schema = {"type": ["string", "null"]}
FLAG: Schema = {"type": ["boolean", "null"]}
OBJECT: Schema = {"type": ["object", "null"]}


def integer(low: int, high: int | None = None) -> Schema:
    return {
        "type": ["integer", "null"],
        "minimum": low,
        **({} if high is None else {"maximum": high}),
    }


def number(low: float, high: float) -> Schema:
    return {"type": ["number", "null"], "minimum": low, "maximum": high}


def one_of(words: Iterable[str]) -> Schema:
    return {"enum": [*words, None]}


def listed(items: Schema, least: int = 0, most: int | None = None) -> Schema:
    bounds = {"minItems": least, **({} if most is None else {"maxItems": most})}
    return {"type": ["array", "null"], "items": items, **bounds}


def either(*schemas: Schema) -> Schema:
    return {"anyOf": [*schemas]}


def an_object(needed: dict[str, Schema], more: dict[str, Schema] | None = None) -> Schema:
    properties = {**{name: _not_null(schema) for name, schema in needed.items()}, **(more or {})}
    return {"type": "object", "required": [*needed], "properties": properties}


def _not_null(schema: Schema) -> Schema:
    kinds = schema.get("type")
    return {**schema, "type": kinds[0]} if isinstance(kinds, list) else schema


STRING = _not_null(TEXT)
TOKENS = listed({"type": "integer", "minimum": 0}, 1)
STOP = either(
    {**STRING, "minLength": 1, "maxLength": ask.MAX_STOP_CHARS},
    listed({**STRING, "minLength": 1, "maxLength": ask.MAX_STOP_CHARS}, 0, ask.MAX_STOPS),
)
PARTS = listed(an_object({"type": STRING}), 1)
TEXT_OR_PARTS = either(STRING, _not_null(PARTS))

NAMES = {
    "model": TEXT,
    "user": TEXT,
    "metadata": OBJECT,
    "prompt_cache_key": TEXT,
    "priority": one_of(Priority),
}
STREAM = {
    "stream": FLAG,
    "stream_options": {**OBJECT, "properties": {"include_usage": FLAG}},
}
SAMPLING = {
    "temperature": number(0, 2),
    "top_p": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1},
    "top_k": integer(0),
    "min_p": number(0, 1),
    "seed": integer(-ask.MAX_SEED - 1, ask.MAX_SEED - ask.MAX_CHOICES),
    "frequency_penalty": number(-2, 2),
    "presence_penalty": number(-2, 2),
    "logit_bias": {
        **OBJECT,
        "maxProperties": ask.MAX_BIASES,
        "propertyNames": {"pattern": f"^[0-9]{{1,{ask.MAX_ID_DIGITS}}}$"},
        "additionalProperties": number(-100, 100),
    },
    "stop": STOP,
    "n": integer(1, ask.MAX_CHOICES),
    "ignore_eos": FLAG,
}
FORM = {
    **OBJECT,
    "required": ["type"],
    "properties": {
        "type": {"enum": ["text", "json_object", "json_schema"]},
        "json_schema": an_object({"schema": OBJECT}, {"name": TEXT, "strict": FLAG}),
    },
}
DESCRIBED = an_object(
    {"name": {**STRING, "pattern": "^[A-Za-z0-9_.:/-]{1,128}$"}},
    {"description": TEXT, "parameters": OBJECT, "strict": FLAG},
)
TOOL = an_object({"type": {"const": "function"}, "function": DESCRIBED})
CALL = an_object(
    {"function": an_object({"name": DESCRIBED["properties"]["name"]}, {"arguments": TEXT})},
    {"id": TEXT, "type": TEXT},
)
MESSAGE = an_object(
    {"role": {"enum": list(ROLES)}},
    {
        "content": either(TEXT, PARTS),
        "tool_calls": listed(CALL),
        "tool_call_id": TEXT,
        "name": TEXT,
        "reasoning_content": TEXT,
    },
)
CHAT = an_object(
    {"messages": listed(MESSAGE, 1)},
    {
        **NAMES,
        **STREAM,
        **SAMPLING,
        "max_tokens": integer(1),
        "max_completion_tokens": integer(1),
        "logprobs": FLAG,
        "top_logprobs": integer(0, ask.MAX_LOGPROBS),
        "tools": listed(TOOL, 0, MAX_TOOLS),
        "tool_choice": either(one_of(CHOICES), an_object({"type": STRING, "function": OBJECT})),
        "parallel_tool_calls": FLAG,
        "response_format": FORM,
        "reasoning_effort": one_of(ask.EFFORTS),
        "chat_template_kwargs": OBJECT,
    },
)
COMPLETION = an_object(
    {
        "prompt": either(
            STRING,
            _not_null(TOKENS),
            _not_null(listed(either(STRING, _not_null(TOKENS)), 1, completions.MAX_PROMPTS)),
        )
    },
    {
        **NAMES,
        **STREAM,
        **SAMPLING,
        "max_tokens": integer(0),
        "echo": FLAG,
        "logprobs": integer(0, completions.MAX_LOGPROBS),
        "best_of": integer(1, ask.MAX_CHOICES),
        "response_format": FORM,
    },
)
BLOCKS = either(STRING, listed(an_object({"type": STRING})))
ANTHROPIC_TOLD = an_object(
    {
        "messages": listed(
            an_object({"role": {"enum": ["user", "assistant", "system"]}, "content": BLOCKS}), 1
        )
    },
    {
        "model": TEXT,
        "system": either(BLOCKS, {"type": "null"}),
        "tools": listed(an_object({"name": STRING}, {"input_schema": OBJECT})),
        "tool_choice": OBJECT,
        "thinking": OBJECT,
        "output_config": OBJECT,
    },
)
ANTHROPIC = an_object(
    {"max_tokens": integer(1), **ANTHROPIC_TOLD["properties"]},
    {
        "stop_sequences": listed(STRING),
        "stream": FLAG,
        "temperature": number(0, 1),
        "top_p": number(0, 1),
        "top_k": integer(0),
        "metadata": OBJECT,
    },
) | {"required": ["max_tokens", "messages"]}
RESPONSE = an_object(
    {"input": either(STRING, listed({"type": "object"}))},
    {
        **NAMES,
        "instructions": TEXT,
        "previous_response_id": TEXT,
        "store": FLAG,
        "stream": FLAG,
        "max_output_tokens": integer(1),
        "temperature": number(0, 2),
        "top_p": number(0, 1),
        "tools": listed(an_object({"type": STRING})),
        "tool_choice": either(TEXT, OBJECT),
        "parallel_tool_calls": FLAG,
        "text": OBJECT,
        "reasoning": OBJECT,
        "include": listed(STRING),
        "top_logprobs": integer(0, ask.MAX_LOGPROBS),
        "truncation": TEXT,
    },
)
FORK = an_object({"name": STRING}, {"head": TEXT}) | {"additionalProperties": False}
REWIND = an_object({}, {"tokens": integer(1), "turn": integer(1), "head": TEXT}) | {
    "additionalProperties": False
}
NOTHING = an_object({}) | {"additionalProperties": False}
FILE = an_object({"file": STRING, "purpose": {"const": "batch"}})
BATCH = an_object(
    {"input_file_id": STRING, "endpoint": STRING, "completion_window": STRING},
    {"metadata": OBJECT},
)
