"""What a sequence has computed, copied out as blocks: to the pool, to the store, to its agent.

    full      blocks as they fill, and of recurrent layers the states where they were marked
    park      all of it, also the partial last block
    turn      at the end of one: all of it, and whose it is

Of one model.  Knows nothing of restoring and of steps.  Engine thread only; the store's threads
answer by `post`.
"""

from agent_memory.block import BLOCK_TOKENS, Block, BlockHash, token_bytes
from agent_memory.engine.matching import Matching
from agent_memory.engine.reads import Post
from agent_memory.engine.sequence import Sequence
from agent_memory.engine.witness import Witness
from agent_memory.kv_spec import KVSpec
from agent_memory.kvcache import states
from agent_memory.kvcache.block_pool import BlockPool
from agent_memory.kvcache.states import States
from agent_memory.metrics import Metrics
from agent_memory.store.block_store import BlockStore
from agent_memory.store.heads import num_tokens


class Commits:
    def __init__(
        self,
        spec: KVSpec,
        pool: BlockPool,
        store: BlockStore,
        metrics: Metrics,
        post: Post,
        witness: Witness,
        matching: Matching,
    ) -> None:
        self._spec = spec
        self._pool = pool
        self._store = store
        self._metrics = metrics
        self._post = post
        self._witness = witness
        self._matching = matching

    def full(self, seq: Sequence) -> None:
        """Blocks that have filled, and positions that were marked, since the last call."""
        while seq.num_kept - seq.num_committed >= BLOCK_TOKENS:
            if not self._commit(seq, seq.num_committed + BLOCK_TOKENS):
                assert seq.kv is not None
                seq.kv.release(seq.num_kept - 2 * BLOCK_TOKENS)  # windows cannot wait for room
                break
        marks = seq.kv.marks if seq.kv else {}
        for position in [p for p in marks if p <= seq.num_kept]:
            self._commit_checkpoint(seq, position, marks.pop(position))

    def offer(self, seq: Sequence, num_tokens: int) -> None:
        """Have the first `num_tokens` of a running sequence in the pool, for another to go on from.

        What of them fills no block is offered in RAM only: on disk it would soon be of no use.
        """
        self.full(seq)
        if seq.kv is None or not seq.num_committed < num_tokens <= seq.num_kept:
            return
        block = self._block(seq, num_tokens)
        if self._matching.find(block) is None:
            self._pool.put(block, seq.kv.copy_out(seq.num_committed, num_tokens))
            seq.passed.append(block)

    def park(self, seq: Sequence) -> None:
        """Everything that was computed, as far as the pool has room."""
        self.full(seq)
        if 0 < seq.num_kept - seq.num_committed < BLOCK_TOKENS:
            self._commit(seq, seq.num_kept)
        if self._spec.states and seq.kv and 0 < seq.kv.length == seq.num_kept:
            self._commit_checkpoint(seq, seq.num_kept, seq.kv.states)

    def turn(self, seq: Sequence) -> None:
        """At the end of a turn, however it ended: everything that was computed, and whose it is."""
        if seq.kv is not None:
            self.park(seq)
            left_out = seq.num_kept - seq.num_committed
            self._metrics.commits_skipped.inc(-(-left_out // BLOCK_TOKENS))
            self._witness.left_out(seq.end, seq.tokens[seq.num_committed : seq.num_kept])
            self._bring_back(seq)
            for block in seq.chain:
                self._persist(seq, block)
            self._pool.use(seq.chain)
        self.own(seq)

    def own(self, seq: Sequence) -> None:
        """What was committed of it is its agent's, and goes with it."""
        agent_id, kept = seq.request.agent, tuple(seq.chain or seq.before)
        if agent_id is None or not kept:
            return
        self._witness.saw(agent_id, kept)
        turn = seq.num_prompt, seq.num_kept or num_tokens(kept)
        points = self._matching.checkpoints_of(kept, seq.checkpoints)
        for old in self._store.record(
            agent_id, self._spec.fingerprint, kept, turn, points, seq.passed
        ):
            self._pool.drop(old.hash)

    def _bring_back(self, seq: Sequence) -> None:
        """Blocks that have gone since they were restored or committed, with another agent that
        had them or because their file was damaged: the sequence still has them in mind."""
        assert seq.kv is not None
        for i, block in enumerate(seq.chain):
            if self._matching.find(block) is None and not self._store.pending(block.hash):
                start = i * BLOCK_TOKENS
                end = start + block.num_tokens
                if seq.kv.has(start, end):
                    self._pool.put(block, seq.kv.copy_out(start, end))

    def _commit(self, seq: Sequence, end: int) -> bool:
        """Copy the tokens since the last commit out as one block; False: the pool is full, or it
        was for so long that windows have dropped some of them."""
        assert seq.kv is not None
        start, block = seq.num_committed, self._block(seq, end)
        if self._matching.find(block) is None:
            if not seq.kv.has(start, end):
                return False
            if not self._pool.make_room(self._spec.payload_bytes(end - start)):
                return False
            self._pool.put(block, seq.kv.copy_out(start, end))
            self._metrics.blocks_committed.inc()
        seq.chain.append(block)
        seq.kv.release(end)
        self._persist(seq, block)
        return True

    def _commit_checkpoint(self, seq: Sequence, position: int, kept: States) -> None:
        """What recurrent layers kept at `position`, unless the KV before it has found no room."""
        num_full = position // BLOCK_TOKENS
        if num_full > len(seq.chain):
            return
        parent = seq.chain[num_full - 1].hash if num_full else seq.root
        since = seq.tokens[num_full * BLOCK_TOKENS : position]
        point = Block.checkpoint_after(parent, token_bytes(since))
        if self._matching.find(point) is None:
            if not self._pool.make_room(self._spec.state_bytes):
                return
            self._pool.put(point, states.copy_out(self._spec, kept))
        seq.checkpoints.append(point)
        self._persist(seq, point)

    def _block(self, seq: Sequence, end: int) -> Block:
        """Of the tokens since the last commit."""
        return Block.of(seq.end, token_bytes(seq.tokens[seq.num_committed : end]))

    def _persist(self, seq: Sequence, block: Block) -> None:
        """Short one-shots of nobody stay in RAM; everything else goes to disk at once."""
        if seq.request.agent is None and seq.num_kept < BLOCK_TOKENS:
            return
        known = self._store.find(block.hash) is not None or self._store.pending(block.hash)
        if known or block.hash not in self._pool:
            return

        def written(block_hash: BlockHash, _ok: bool) -> None:
            self._post(lambda: self._written(block_hash))

        payload = self._pool.hold(block.hash)
        self._store.put(block, payload, self._spec, written, seq.request.agent)

    def _written(self, block_hash: BlockHash) -> None:
        if block_hash in self._pool:  # else the pool was cleared before the store was done
            self._pool.release(block_hash)
