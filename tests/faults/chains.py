"""What a head remembers, told by its tokens alone."""

from collections.abc import Iterable

from agent_memory.block import Block
from agent_memory.store.heads import Head


def remembers(head: Head, blocks: Iterable[Block]) -> bool:
    """Whether the head begins with these blocks' tokens."""
    wanted = b"".join(block.tokens for block in blocks)
    own = b"".join(block.tokens for block in head.chain)[: 4 * head.num_tokens]
    return own.startswith(wanted)
