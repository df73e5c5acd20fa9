"""Which models are configured: a name that requests use, and where its files are.

    builtin                        itself
    ~/models/llama                 a folder: its last part is the name
    mlx-community/Qwen3-4B-4bit    a hub id is its own name
    small=mlx-community/Qwen3-…    a name of one's own

Pure but for one look whether a folder is there.  Any thread.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from agent_memory.errors import ConfigError

BUILTIN = "builtin"
MODELS = "models"
"""The settings file's table of models, in the place of the key `model`."""
MAX_CONTEXT = 1 << 27
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/+-]{0,199}")
_FIELDS = {"source": str, "pin": bool, "context_length": int}


@dataclass(frozen=True, slots=True)
class ModelSource:
    """`pinned`: not unloaded to make room.  `context_length` None: what the model was made for."""

    name: str
    source: str
    pinned: bool = False
    context_length: int | None = None


def parse(text: str) -> ModelSource:
    """`SOURCE` or `NAME=SOURCE`.  Raises ValueError."""
    name, equals, source = text.partition("=")
    if equals and _NAME.fullmatch(name):
        return ModelSource(name, _checked(source))
    return ModelSource(_own_name(_checked(text)), text)


def of_file(table: Mapping[str, object], file: Path) -> list[ModelSource]:
    """Of a settings file that has the table.  Raises ConfigError."""
    rows = table[MODELS]
    if "model" in table or not isinstance(rows, dict) or not rows:
        raise ConfigError(
            f"{file}, [{MODELS}]: a table that names models, in the place of the key 'model'. "
            "Keep one of the two."
        )
    models = []
    for name, value in rows.items():
        try:
            models.append(_of_row(name, value))
        except ValueError as error:
            raise ConfigError(
                f"{file}, [{MODELS}], key '{name}': {value!r} cannot be used. Allowed: {error}."
            ) from error
    return models


def several(
    chosen: ModelSource | list[ModelSource], place: str, context_length: int | None
) -> tuple[ModelSource, ...]:
    """No two of one name, the first with the context that was asked for.  Raises ConfigError."""
    models = list(chosen) if isinstance(chosen, list) else [chosen]
    names = [model.name for model in models]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"{place}: two models would be called '{name}'. Name one of them: "
                f"--model NAME={models[names.index(name)].source}"
            )
    if context_length is not None:
        models[0] = replace(models[0], context_length=context_length)
    return tuple(models)


def _of_row(name: str, value: object) -> ModelSource:
    """The source, or a table that has it.  Raises ValueError with what is allowed."""
    facts = {"source": value} if isinstance(value, str) else value
    if not _NAME.fullmatch(name):
        raise ValueError("a name of letters, digits and . _ : @ / + -")
    if not isinstance(facts, Mapping) or "source" not in facts:
        raise ValueError("a source, or a table with 'source', and perhaps 'pin', 'context_length'")
    for key, fact in facts.items():
        if type(fact) is not _FIELDS.get(key):  # not isinstance: true is no number here
            raise ValueError("'source' a text, 'pin' true or false, 'context_length' a number")
    length = facts.get("context_length")
    if length is not None and not 2 <= length <= MAX_CONTEXT:
        raise ValueError(f"a context_length of 2 to {MAX_CONTEXT}")
    return ModelSource(name, _checked(facts["source"]), facts.get("pin", False), length)


def _checked(source: str) -> str:
    if not source.strip() or not source.isprintable():
        raise ValueError("a source: builtin, a directory, or a Hugging Face name")
    return source


def _own_name(source: str) -> str:
    """A path is told by how it begins, or by being there."""
    if source == BUILTIN:
        return source
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:  # ~ of a user who has no home
        raise ValueError("a directory that can be") from error
    name = path.absolute().name if source[0] in "/~." or path.is_dir() else source
    if not name:
        raise ValueError("a directory with a name")
    return name
