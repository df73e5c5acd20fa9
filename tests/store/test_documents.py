"""Documents: whole or not there, whatever their ids, found by their owner, bounded."""

import os
import time
from pathlib import Path

import pytest

from agent_memory.errors import NotFound
from agent_memory.store import upkeep
from agent_memory.store.documents import RESPONSES, Documents, response_ids_of
from agent_memory.store.look import Amount, contents
from agent_memory.store.state_dir import StateDir, private_folder


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    state = StateDir.unlocked(tmp_path / "state")
    private_folder(state.tmp)
    return state


def test_what_is_put_is_there_until_it_is_deleted(state: StateDir) -> None:
    kept = Documents(state, "things")
    kept.put("a_1", {"text": "é"})
    kept.put("a_1", {"text": "ü"})
    kept.data("a_1").write_bytes(b"more")
    assert Documents(state, "things").get("a_1") == {"text": "ü"}
    assert Documents(state, "others").get("a_1") is None
    assert kept.delete("a_1") and not kept.delete("a_1")
    assert kept.get("a_1") is None and not list((state.documents / "things").iterdir())


@pytest.mark.parametrize("doc_id", ["", "..", "a/b", "a.json", "x" * 101, "é", "a\n", "\0"])
def test_what_cannot_be_an_id_is_not_there(state: StateDir, doc_id: str) -> None:
    kept = Documents(state, "things")
    assert kept.get(doc_id) is None and not kept.delete(doc_id)


@pytest.mark.parametrize("damage", [b"", b'{"a"', b"[1]", b"\xff"])
def test_a_damaged_one_is_told(state: StateDir, damage: bytes) -> None:
    kept = Documents(state, "things")
    kept.put("a", {})
    (state.documents / "things" / "a.json").write_bytes(damage)
    with pytest.raises(ValueError):
        kept.get("a")


def aged(state: StateDir, kept: Documents, names: str) -> None:
    """Each an hour younger than the one before; the last is new."""
    for n, name in enumerate(names, 1):
        kept.put(name, {"n": n})
        written = time.time() - 3600 * (len(names) - n)
        os.utime(state.documents / "things" / f"{name}.json", (written, written))


@pytest.mark.parametrize(
    ("most", "most_bytes", "hours", "left"),
    [
        (9, 1000, 9, "dcba"),
        (2, 1000, 9, "dc"),
        (9, 3 * len('{"n":1}'), 9, "dcb"),
        (9, 1000, 1.5, "dc"),
        (0, 1000, 9, ""),
    ],
)
def test_the_oldest_go_first(
    state: StateDir, most: int, most_bytes: int, hours: float, left: str
) -> None:
    kept = Documents(state, "things")
    aged(state, kept, "abcd")
    gone = kept.trim(most, most_bytes, time.time() - 3600 * hours)
    assert "".join(kept.ids()) == left and gone == (4 - len(left)) * [len('{"n":1}')]


def test_an_agents_are_found_by_their_ids(state: StateDir) -> None:
    kept = Documents(state, RESPONSES)
    for agent in ("ann", "ben", None):
        for n in range(2):
            kept.put(f"{response_ids_of(agent)}{n}", {"of": agent})
    assert len(kept.delete_all(response_ids_of("ann"))) == 2
    left = [kept.get(doc_id) for doc_id in kept.ids()]
    assert sorted(str(document) for document in left) == 2 * ["{'of': 'ben'}"] + 2 * [
        "{'of': None}"
    ]


@pytest.mark.requirement("S-08")
def test_each_tenant_has_its_own(state: StateDir) -> None:
    kept = {tenant: Documents(state, RESPONSES, tenant) for tenant in (None, "acme", "zoo")}
    for tenant, documents in kept.items():
        assert list(documents.ids()) == []
        documents.put(response_ids_of("ann") + "1", {"of": tenant})
        documents.data(response_ids_of("ann") + "1").write_bytes(b"x")
    assert [kept[tenant].get(response_ids_of("ann") + "1") for tenant in kept] == [
        {"of": tenant} for tenant in kept
    ]
    assert upkeep.wipe_agent(state, "acme/ann") == Amount(1, len('{"of":"acme"}'))
    assert [len(list(documents.ids())) for documents in kept.values()] == [1, 0, 1]
    before = sorted(state.path.parent.rglob("*"))
    for odd in ("../ann", "/ann", "zoo/../ann", "ZOO/ann"):
        with pytest.raises(NotFound):
            upkeep.wipe_agent(state, odd)
    assert sorted(state.path.parent.rglob("*")) == before


def test_wiping_an_agent_counts_its_responses(tmp_path: Path) -> None:
    state = StateDir.open(tmp_path / "state")
    kept = Documents(state, RESPONSES)
    private_folder(state.tmp)
    kept.put(response_ids_of("ann") + "1", {"words": "of ann"})
    size = len('{"words":"of ann"}')
    kept.put(response_ids_of("ben") + "1", {})
    assert upkeep.wipe_agent(state, "ann") == Amount(1, size)
    with pytest.raises(NotFound):
        upkeep.wipe_agent(state, "ann")
    assert [*kept.ids()] == [response_ids_of("ben") + "1"]
    before = contents(state.documents)
    assert before.count == 1 and upkeep.wipe(state).count >= 1
    assert not state.documents.exists()
    state.close()
