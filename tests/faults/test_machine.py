"""Pool and store together, by random walks beside a model that only remembers what was promised.

A block that was said to be on disk, and was not damaged or let go of since, is found and read back
right, whatever happened in between; a head that was recorded begins with what is left of it.
"""

import shutil
import tempfile
from itertools import takewhile
from pathlib import Path
from random import Random
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from structlog.testing import capture_logs

from agent_memory.block import BLOCK_TOKENS, Block, chain, common_tokens, token_bytes
from agent_memory.errors import Conflict, NotFound
from agent_memory.kvcache.block_pool import BlockPool
from agent_memory.store.limits import Limits
from tests.faults.chains import remembers
from tests.faults.damage import BLOCK_FILE
from tests.faults.killed import SPEC, payload_of
from tests.store.conftest import Opener
from tests.suites import Cases, NewSuite, sized

AGENTS = ["ada", "ben", "cleo"]
BRANCHES_AT = [0, 100, BLOCK_TOKENS, 400]
POOL_BLOCKS = 6

prompts = st.tuples(st.sampled_from(BRANCHES_AT), st.integers(0, 2), st.integers(1, 800))
seeds = st.integers(0, 1 << 30)


def tokens_of(prompt: tuple[int, int, int]) -> list[int]:
    """The first tokens of one story, and from a place on those of another version of it."""
    branch, version, length = prompt
    return [n if n < branch else 1000 * version + n for n in range(length)]


class Memory(RuleBasedStateMachine):
    folder: ClassVar[Path]
    cases: ClassVar[Cases]

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(dir=self.folder))
        self.num_lives = 0
        self.opener = Opener(self.home / "0", SPEC, payload_of)
        self.opener.open()
        self.pool = BlockPool(POOL_BLOCKS * SPEC.payload_bytes(BLOCK_TOKENS))
        self.promised: set[Block] = set()
        self.damaged: set[Block] = set()
        self.heads: dict[str, list[Block]] = {}

    def teardown(self) -> None:
        self.opener.close()
        shutil.rmtree(self.home)
        self.cases.done = min(self.cases.done + 1, self.cases.planned)

    # ── what an engine does ──────────────────────────────────────────────────────────────────

    @rule(prompt=prompts, agent=st.sampled_from([*AGENTS, None]))
    def turn(self, prompt: tuple[int, int, int], agent: str | None) -> None:
        store, blocks = self.opener.store, chain(SPEC.fingerprint, tokens_of(prompt))
        new = [block for block in blocks if store.find(block.hash) is None]
        for block in blocks:
            self.pool.put(block, payload_of(block))
        assert all(self.opener.put(*new))
        self.promised.update(new)
        self.damaged.difference_update(new)
        if agent is not None:
            let_go = store.record(agent, SPEC.fingerprint, blocks)
            assert store.flush(10)
            self.let_go(let_go)
            self.heads[agent] = blocks
            newest = store.agents.get(agent)
            assert newest is not None and remembers(newest.heads[0], blocks)

    def let_go(self, blocks: tuple[Block, ...]) -> None:
        self.promised.difference_update(blocks)
        for block in blocks:
            self.pool.drop(block.hash)
            assert self.opener.store.find(block.hash) is None

    @rule(agent=st.sampled_from(AGENTS), new=st.sampled_from(["dan", "eve", *AGENTS]))
    def fork(self, agent: str, new: str) -> None:
        """Content has no owner: nothing is copied, nothing goes."""
        store = self.opener.store
        if store.agents.get(agent) is None:
            with pytest.raises(NotFound):
                store.fork(agent, new)
        elif store.agents.get(new) is not None:
            with pytest.raises(Conflict):
                store.fork(agent, new)
        else:
            store.fork(agent, new)
            assert store.flush(10)
            if agent in self.heads:
                self.heads[new] = self.heads[agent]

    @rule(agent=st.sampled_from([*AGENTS, "dan"]))
    def remove(self, agent: str) -> None:
        """All that was this agent's alone goes, and only that."""
        store = self.opener.store
        if store.agents.get(agent) is None:
            with pytest.raises(NotFound):
                store.remove(agent)
            return
        gone = store.remove(agent)
        assert store.flush(10)
        self.heads.pop(agent, None)
        for head in [head for other in store.agents.all() for head in other.heads]:
            assert not gone & {block.hash for block in head.chain}
        self.promised = {block for block in self.promised if block.hash not in gone}
        for block_hash in gone:
            self.pool.drop(block_hash)
            assert store.find(block_hash) is None
            assert not list(self.opener.path.rglob(f"blocks/*/{block_hash.hex()}*"))

    @rule(agent=st.sampled_from(AGENTS), share=st.floats(0.05, 1))
    def rewind(self, agent: str, share: float) -> None:
        store = self.opener.store
        known = store.agents.get(agent)
        if known is None:
            return
        chain_before = known.heads[0].chain
        num_tokens = max(1, int(share * known.heads[0].num_tokens))
        head = store.rewind(agent, num_tokens).heads[0]
        assert store.flush(10)
        assert head.num_tokens == num_tokens
        assert tuple(chain_before[: len(head.chain)]) == head.chain
        self.heads[agent] = list(head.chain[: num_tokens // BLOCK_TOKENS])
        lost = {block for block in self.promised if store.find(block.hash) is None}
        assert lost <= set(chain_before[len(head.chain) :])
        self.promised -= lost

    @rule(prompt=prompts)
    def match_and_restore(self, prompt: tuple[int, int, int]) -> None:
        """As much is found as is promised, exact to the token, and what is read is right."""
        tokens = token_bytes(tokens_of(prompt))
        store, parent, at = self.opener.store, SPEC.fingerprint, 0
        while len(tokens) - at >= 4 * BLOCK_TOKENS:
            wanted = Block.of(parent, tokens[at : at + 4 * BLOCK_TOKENS])
            if not self.restored(wanted):
                assert wanted not in self.promised
                return
            store.touch([wanted.hash])
            parent, at = wanted.hash, at + 4 * BLOCK_TOKENS
        near = [*self.pool.children(parent), *store.children(parent)]
        shared = max((common_tokens(block.tokens, tokens[at:]) for block in near), default=0)
        for block in self.promised:
            if block.parent == parent:
                assert common_tokens(block.tokens, tokens[at:]) <= shared

    def restored(self, wanted: Block) -> bool:
        if self.pool.find(wanted.hash):
            payload = self.pool.hold(wanted.hash)
            np.testing.assert_array_equal(payload, payload_of(wanted))
            self.pool.release(wanted.hash)
            return True
        if self.opener.store.find(wanted.hash) is None:
            return False
        found = self.opener.read(wanted)
        assert found == (wanted not in self.damaged)
        if found:
            self.pool.put(wanted, payload_of(wanted))
        return found

    @rule(num_blocks=st.integers(0, POOL_BLOCKS))
    def evict(self, num_blocks: int) -> None:
        assert self.pool.make_room(num_blocks * SPEC.payload_bytes(BLOCK_TOKENS))

    # ── what happens to it ───────────────────────────────────────────────────────────────────

    @rule()
    def reopen(self) -> None:
        self.opener.open()
        self.look_after_start()

    @rule()
    def crash(self) -> None:
        """What lies on disk goes on elsewhere; the process that wrote it is no more."""
        assert self.opener.store.flush(10)
        self.num_lives += 1
        next_home = self.home / str(self.num_lives)
        ignored = shutil.ignore_patterns("*-shm", "LOCK")
        shutil.copytree(self.opener.path, next_home, ignore=ignored)
        self.opener.close()
        shutil.rmtree(self.opener.path)
        self.opener.path = next_home
        self.opener.open()
        self.look_after_start()

    @rule(num_bytes=st.integers(0, 1 << 20))
    def make_room(self, num_bytes: int) -> None:
        """A start with a narrower limit: no more than that is left, then the limit goes again."""
        wide, self.opener.limits = self.opener.limits, Limits(num_bytes, min_free_bytes=0)
        store = self.opener.open()
        assert store.flush(10)
        assert store.disk_bytes <= num_bytes
        self.promised = {block for block in self.promised if store.find(block.hash)}
        self.opener.limits = wide
        self.heads.clear()
        self.opener.open()
        self.look_after_start()

    def look_after_start(self) -> None:
        self.pool.clear()
        for agent, blocks in self.heads.items():
            whole = list(takewhile(lambda block: self.opener.store.find(block.hash), blocks))
            found = self.opener.store.agents.get(agent)
            heads = found.heads if found else ()
            assert not whole or any(remembers(head, whole) for head in heads)
            self.heads[agent] = whole  # what a start has cut off a head stays off

    @precondition(lambda self: self.promised)
    @rule(seed=seeds)
    def damage(self, seed: int) -> None:
        rng = Random(seed)
        block = rng.choice(sorted(self.promised, key=lambda block: block.hash))
        path = self.opener.file(block)
        good = path.read_bytes()
        raw = bytearray(good)
        rng.choice(BLOCK_FILE)(raw, rng)
        if raw != good:
            path.write_bytes(raw)
            self.promised.discard(block)
            self.damaged.add(block)

    # ── what always holds ────────────────────────────────────────────────────────────────────

    @invariant()
    def holds(self) -> None:
        store = self.opener.store
        store.check()
        self.pool.check()
        assert store.pending_bytes == 0
        assert not list((self.opener.path / "tmp").iterdir())
        for block in self.promised:
            assert store.find(block.hash) == block
            assert self.opener.file(block).exists()


@sized(short=5, full=300)
def test_pool_and_store(num_cases: int, fast_folder: Path, suite: NewSuite) -> None:
    with suite("random walks of pool and store", num_cases, None) as cases, capture_logs():
        machine = type("Walk", (Memory,), {"folder": fast_folder, "cases": cases})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=num_cases,
                stateful_step_count=40,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
