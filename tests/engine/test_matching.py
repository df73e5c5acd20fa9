"""What of a prompt is found, among however many that begin alike."""

from random import Random

import numpy as np
import pytest

from agent_memory.block import Block, chain, common_tokens, token_bytes
from agent_memory.engine import matching as engine_matching
from agent_memory.engine.matching import Matching
from agent_memory.kv_spec import KVSpec
from agent_memory.kvcache.block_pool import BlockPool
from tests.store.conftest import Opener, PayloadOf

ALIKE = list(range(20))
"""As a template begins every prompt."""


@pytest.fixture
def plain(spec: KVSpec) -> KVSpec:
    return KVSpec(spec.groups, "plain")


def test_the_closest_is_found_in_ram_and_on_disk(
    opener: Opener, plain: KVSpec, payload_of: PayloadOf
) -> None:
    """As by laying all of them beside the prompt; of two that are equal the one in RAM."""
    rng, pool, store = Random(7), BlockPool(64 << 20), opener.open()
    matching, blocks = Matching(plain, pool, store), list[Block]()
    for n in range(60):
        tokens = [*ALIKE, *(rng.randrange(2) for _ in range(rng.randrange(1, 9)))]
        [block] = chain(plain.fingerprint, tokens)
        payload = payload_of(block)[: plain.bytes_of(block)]
        if n % 2:
            pool.put(block, payload)
        else:
            store.put(block, payload, plain, lambda _hash, _ok: None)
        blocks.append(block)
    assert store.flush(10)
    for length in (0, 5, 20, 24, 30):
        wanted = [*ALIKE, *(rng.randrange(2) for _ in range(10))][:length]
        most = max(common_tokens(block.tokens, token_bytes(wanted)) for block in blocks)
        spans = matching.kv_of([*wanted, 0], plain.fingerprint)
        assert [span.count for span in spans] == [most][: length > 0]
        in_ram = [
            block
            for block in blocks
            if block.hash in pool and common_tokens(block.tokens, token_bytes(wanted)) == most
        ]
        assert not in_ram or not spans or spans[0].block in in_ram


def test_few_of_many_that_begin_alike_are_looked_at(
    monkeypatch: pytest.MonkeyPatch, opener: Opener, plain: KVSpec
) -> None:
    """Each was a conversation of its own once; the engine thread has other things to do."""
    rng, pool, compared = Random(8), BlockPool(1 << 20), list[bytes]()
    for _ in range(1000):
        [block] = chain(plain.fingerprint, [*ALIKE, *(rng.randrange(30_000) for _ in range(9))])
        pool.put(block, np.zeros(1, np.uint8))

    def counted(a: bytes, b: bytes) -> int:
        compared.append(a)
        return common_tokens(a, b)

    monkeypatch.setattr(engine_matching, "common_tokens", counted)
    matching = Matching(plain, pool, opener.open())
    [span] = matching.kv_of([*ALIKE, *range(40_000, 40_300)], plain.fingerprint)
    assert (span.count, len(compared)) == (20, 1)
