"""Ordinary text in pieces of a wanted length: what every CPython ships about itself."""

from collections.abc import Iterator
from pydoc_data.topics import topics

from tokenizers import Tokenizer

from agent_memory import builtin


def texts(num_tokens: int) -> Iterator[str]:
    """Texts of about so many tokens, none like another."""
    tokenizer = Tokenizer.from_file(str(builtin.PATH / "tokenizer.json"))
    ids = tokenizer.encode("\n".join(topics[name] for name in sorted(topics))).ids
    for at in range(0, len(ids) - num_tokens, num_tokens):
        yield "Read this:\n" + tokenizer.decode(ids[at : at + num_tokens - 20])
