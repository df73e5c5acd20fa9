"""F16, F23: names that people send, and models that differ in one thing.  Nothing is mixed up."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_memory import kv_spec
from agent_memory.block import Block, chain
from agent_memory.errors import BadRequest
from agent_memory.kv_spec import KVSpec, LayerGroup, TensorFormat
from agent_memory.model.digests import model_digest
from agent_memory.server.identity import agent_of, is_name
from agent_memory.store.files import Bytes
from tests.store.conftest import Opener
from tests.suites import NewSuite, sized

SEED = 160
STRANGE = [
    "../../etc/passwd",
    "..",
    ".",
    "%2e%2e%2f",
    "a/b",
    "a\\b",
    "a\0b",
    "a\nb",
    " a",
    "a ",
    "a.",
    "CON",
    "Bob",
    "bob",
    "x" * 200,
    "x" * 201,
    "x" * 300,
    "caf\u00e9",
    "cafe\u0301",
    "b\u043eb",
    "\u202eadmin",
    "\U0001f600",
    "\ud83d",
    "\ude00",
    "agent:1",
    "a@b",
    "-rf",
    "'; DROP TABLE heads; --",
    "0",
    "nan",
    "\u212a",
    "K",
    "k",
]
TEXT = st.one_of(st.sampled_from(STRANGE), st.text(st.characters(), min_size=1, max_size=250))


def names_of(text: str) -> Iterator[str]:
    """What one text becomes wherever a client may say who it is."""
    try:
        named = agent_of({"x-agent-id": text}, {})
        assert named == text
        yield text
    except BadRequest as error:
        assert error.param == "X-Agent-ID" and not is_name(text)
    for headers, body in (
        ({"x-session-id": text}, {}),
        ({}, {"prompt_cache_key": text}),
        ({}, {"user": text}),
    ):
        found = agent_of(headers, body)
        assert found is not None
        yield found


@pytest.mark.requirement("B-18", "F-16", "S-20")
def test_names_are_names_and_two_texts_are_two(suite: NewSuite) -> None:
    seen: dict[str, str] = {}
    with suite("F16 agent ids", len(STRANGE), None) as cases:
        for text in STRANGE:
            with cases.case(text):
                for name in names_of(text):
                    assert is_name(name) and name.isascii() and len(name) <= 200
                    assert seen.setdefault(name, text) == text


def two_texts_are_two(first: str, second: str) -> None:
    names = [set(names_of(text)) for text in (first, second)]
    assert all(is_name(name) for found in names for name in found)
    assert [len(found) for found in names] == [1, 1]
    assert (names[0] == names[1]) == (first == second)


@pytest.mark.requirement("F-16")
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(TEXT, TEXT)
def test_any_two_texts(first: str, second: str) -> None:
    two_texts_are_two(first, second)


@pytest.mark.requirement("F-16")
@pytest.mark.slow
def test_many_pairs_of_texts(suite: NewSuite) -> None:
    with suite("F16 agent ids, any", 5000, None) as cases:

        @settings(max_examples=5000, deadline=None, derandomize=True, database=None)
        @given(TEXT, TEXT)
        def pairs(first: str, second: str) -> None:
            if cases.done < cases.planned:
                with cases.case((first, second)):
                    two_texts_are_two(first, second)

        pairs()


@pytest.mark.requirement("F-16", "S-20")
def test_each_name_has_its_own_memory(opener: Opener) -> None:
    names = sorted({name for text in STRANGE for name in names_of(text)})
    store, root = opener.open(), opener.spec.fingerprint
    chains = {name: chain(root, [n, 1, 2]) for n, name in enumerate(names)}
    for name, blocks in chains.items():
        opener.put(*blocks)
        store.record(name, root, blocks)
    for _ in range(2):
        agents = {agent.id: agent for agent in opener.store.agents.all()}
        assert {name: a.heads[0].chain for name, a in agents.items()} == {
            name: tuple(blocks) for name, blocks in chains.items()
        }
        opener.open()
    inside = {path.name for path in opener.path.rglob("*")}
    assert not inside & set(names)  # no name of theirs is a name of ours
    assert [path.name for path in opener.path.parent.iterdir()] == ["state"]


PACKED = TensorFormat(64, "BF16", bits=4, group_size=32)
GROUP = LayerGroup("full", (0, 1), 2, PACKED, PACKED)
SPEC = KVSpec((GROUP, replace(GROUP, kind="window", layers=(2,), window=128)), "digest")


def with_group(**changed: Any) -> KVSpec:
    return replace(SPEC, groups=(replace(GROUP, **changed), *SPEC.groups[1:]))


def with_k(**changed: Any) -> KVSpec:
    return with_group(k=replace(PACKED, **changed))


OTHER_SPECS = {
    "weights, config or tokenizer": replace(SPEC, model_digest="digesu"),
    "kind": with_group(kind="latent"),
    "layers": with_group(layers=(1, 0)),
    "kv heads": with_group(kv_heads=4),
    "head dim": with_k(dim=128),
    "element type": with_k(dtype="F16"),
    "bits": with_k(bits=8),
    "group size": with_k(group_size=64),
    "values' form": with_group(v=TensorFormat(64, "BF16")),
    "window": replace(SPEC, groups=(GROUP, replace(SPEC.groups[1], window=64))),
    "one more group": replace(SPEC, groups=(*SPEC.groups, replace(GROUP, layers=(3,)))),
    "order of groups": replace(SPEC, groups=SPEC.groups[::-1]),
}


@pytest.mark.requirement("B-17", "F-23", "L-41")
@sized(short=1, full=20)
def test_another_model_hits_nothing(num_cases: int, opener: Opener, suite: NewSuite) -> None:
    """`num_cases` prompts for each field."""
    rng = Random(SEED)
    assert len({spec.fingerprint for spec in (SPEC, *OTHER_SPECS.values())}) == 13
    opener.spec = SPEC
    opener.payload_of = payload
    store = opener.open()
    planned = num_cases * len(OTHER_SPECS)
    with suite("F23 a model that differs in one field", planned, SEED) as cases:
        for n in range(num_cases):
            tokens = [rng.randrange(50_000) for _ in range(rng.randrange(1, 700))]
            blocks = chain(SPEC.fingerprint, tokens)
            assert all(opener.put(*blocks))
            for field, other in OTHER_SPECS.items():
                with cases.case((n, field)):
                    assert store.children(other.fingerprint) == []
                    theirs = chain(other.fingerprint, tokens)
                    assert [store.find(block.hash) for block in theirs] == [None] * len(theirs)
                    assert not set(theirs) & set(blocks)
    assert all(opener.read(block) for block in chain(SPEC.fingerprint, tokens))


def payload(block: Block) -> Bytes:
    random = np.random.default_rng(list(block.hash))
    return random.integers(0, 256, SPEC.payload_bytes(block.num_tokens), np.uint8)


@pytest.mark.parametrize("name", ["BLOCK_TOKENS", "KV_ABI"])
def test_our_own_layout_is_in_the_fingerprint(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_spec, name, getattr(kv_spec, name) + 1)
    assert replace(SPEC).fingerprint != SPEC.fingerprint


def change_a_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def add_a_shard(path: Path) -> None:
    shutil.copyfile(path, path.with_name("model-2.safetensors"))


@pytest.mark.requirement("F-23", "L-41")
@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("model.safetensors", change_a_byte),
        ("model.safetensors", add_a_shard),
        ("config.json", change_a_byte),
        ("tokenizer.json", change_a_byte),
    ],
)
def test_files_of_a_model(file: str, change: Callable[[Path], None], tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes(name.encode() * 10)
    before = model_digest(tmp_path)
    assert model_digest(tmp_path) == before
    change(tmp_path / file)
    assert model_digest(tmp_path) != before
