"""What of a prompt is remembered, in pool and store: exact to the token.

Knows chains, and where a model with recurrent layers can go on: at checkpoints only, however much
KV there is behind them.  Brings nothing back.  Engine thread only.
"""

from collections.abc import Sequence

from agent_memory.block import BLOCK_TOKENS, Block, BlockHash, common_tokens, token_bytes
from agent_memory.engine.restore import Span
from agent_memory.kv_spec import KVSpec
from agent_memory.kvcache.block_pool import BlockPool
from agent_memory.store.block_store import BlockStore

_STEP = 4 * BLOCK_TOKENS


class Matching:
    def __init__(self, spec: KVSpec, pool: BlockPool, store: BlockStore) -> None:
        self._spec = spec
        self._pool = pool
        self._store = store

    def find(self, wanted: Block) -> Block | None:
        """Token ids are compared too: a hash is only a name."""
        found = self._pool.find(wanted.hash) or self._store.find(wanted.hash)
        return found if found and found.tokens == wanted.tokens else None

    def kv_of(self, tokens: list[int], root: BlockHash) -> list[Span]:
        """What KV there is of `tokens`, but never of the last one: its logits are wanted.  `root`:
        of the tenant's chains, and no others are looked at."""
        data, spans, parent = token_bytes(tokens[:-1]), list[Span](), root
        for at in range(0, len(data) - _STEP + 1, _STEP):
            block = self.find(Block.of(parent, data[at : at + _STEP]))
            if block is None:
                break
            spans.append(Span(block, at // 4, BLOCK_TOKENS))
            parent = block.hash
        rest = data[len(spans) * _STEP : (len(spans) + 1) * _STEP]
        best = self._closest(parent, rest)
        return [*spans, Span(best[0], len(spans) * BLOCK_TOKENS, best[1])] if best else spans

    def usable(self, spans: list[Span], most: int | None = None) -> list[Span]:
        """As much of them, and of their first `most` tokens, as can be gone on from.  Where there
        are recurrent layers that is up to the last checkpoint, and it comes last."""
        end = spans[-1].start + spans[-1].count if spans else 0
        end = end if most is None else min(end, most)
        return self._to_checkpoint(spans, end) if self._spec.states and end else spans

    def _to_checkpoint(self, spans: list[Span], end: int) -> list[Span]:
        for i in range(end // BLOCK_TOKENS, -1, -1):
            parent = spans[i - 1].block.hash if i else spans[0].block.parent
            within = (
                spans[i].block.tokens[: 4 * (end - i * BLOCK_TOKENS)] if i < len(spans) else b""
            )
            if point := self._last_checkpoint(parent, within):
                count = point.num_tokens
                own = [Span(spans[i].block, i * BLOCK_TOKENS, count)] if count else []
                return [*spans[:i], *own, Span(point, i * BLOCK_TOKENS + count, 0)]
        return []

    def checkpoints_of(self, chain: Sequence[Block], own: Sequence[Block]) -> list[Block]:
        """Those at regular distances along the chain and its `own`, as far as they are there."""
        every = self._spec.checkpoint_tokens // BLOCK_TOKENS
        ends = chain[every - 1 :: every] if every else []
        regular = [Block.checkpoint_after(block.hash, b"") for block in ends if block.full]
        return [point for point in dict.fromkeys((*regular, *own)) if self._is_known(point)]

    def _is_known(self, block: Block) -> bool:
        return self.find(block) is not None or self._store.pending(block.hash)

    def _closest(self, parent: BlockHash, rest: bytes) -> tuple[Block, int] | None:
        """The child of `parent` sharing most leading tokens with `rest`; in RAM rather than not."""
        best: tuple[Block, int] | None = None
        count = 0
        for block in (*self._pool.children(parent), *self._store.children(parent)):
            if 4 * count == len(rest):
                break
            # Of very many conversations few share more than the best so far: only these are laid
            # beside it.
            if block.tokens.startswith(rest[: 4 * (count + 1)]) and not block.is_checkpoint:
                count = common_tokens(block.tokens, rest)
                best = block, count
        return best

    def _last_checkpoint(self, parent: BlockHash, tokens: bytes) -> Block | None:
        """After `parent` and as many of `tokens` as possible."""
        points = [
            block
            for block in (*self._pool.children(parent), *self._store.checkpoints(parent))
            if block.is_checkpoint and tokens.startswith(block.tokens)
        ]
        return max(points, key=lambda block: block.num_tokens, default=None)
