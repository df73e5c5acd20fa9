"""What is kept of responses, on a real disk."""

from pathlib import Path
from typing import Any

import pytest

from agent_memory.errors import BadRequest, NotFound
from agent_memory.server.response_store import Responses
from agent_memory.store.documents import RESPONSES, Document, Documents, response_ids_of
from agent_memory.store.state_dir import StateDir, private_folder

SAID: list[list[dict[str, Any]]] = [[], [{"type": "message", "role": "user", "content": []}]]


@pytest.fixture
def documents(tmp_path: Path) -> Documents:
    state = StateDir.unlocked(tmp_path / "state")
    private_folder(state.tmp)
    return Documents(state, RESPONSES)


def response(agent: str) -> dict[str, Any]:
    return {"id": response_ids_of(agent) + "1", "output": [{"id": "msg_1", "type": "message"}]}


async def test_an_answer_does_not_outlive_the_removal_of_its_agent(documents: Documents) -> None:
    kept = Responses(documents, lambda num_bytes: True)
    began = kept.times_forgotten("ann")
    assert await kept.keep("ann", began, response("ann"), SAID)
    assert await kept.keep("ben", kept.times_forgotten("ben"), response("ben"), SAID)
    assert await kept.forget_agent("ann") == 1
    assert not await kept.keep("ann", began, response("ann"), SAID)
    assert list(documents.ids()) == [response("ben")["id"]]
    assert await kept.keep("ann", kept.times_forgotten("ann"), response("ann"), SAID)


async def test_what_references_name_is_read_once_and_named_once(
    documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many references a body has, they are no more work than what they name."""
    kept, read = Responses(documents, lambda num_bytes: True), list[str]()
    said = [[], [{"type": "message", "role": "user", "content": [n]} for n in range(50)]]
    assert await kept.keep("ann", 0, response("ann"), said)
    answer = response("ann")["id"].removeprefix("resp_")
    references = [{"type": "item_reference", "id": f"msg_{answer}_i{n}"} for n in range(50)]
    get = documents.get

    def noted(own_id: str) -> Document | None:
        read.append(own_id)
        return get(own_id)

    monkeypatch.setattr(documents, "get", noted)
    own = {"type": "message", "role": "user", "content": ["mine"]}
    found = await kept.resolved([*references[::-1], own])
    assert [item["content"] for item in found] == [*([n] for n in range(49, -1, -1)), ["mine"]]
    assert read == [response("ann")["id"]]
    with pytest.raises(BadRequest, match=references[3]["id"]):
        await kept.resolved([*references, own, references[3]])
    with pytest.raises(NotFound, match=f"msg_{answer}_i50"):
        await kept.resolved([*references, {**references[0], "id": f"msg_{answer}_i50"}])
    assert len(read) == 2


async def test_a_damaged_response_is_not_there(documents: Documents, tmp_path: Path) -> None:
    kept = Responses(documents, lambda num_bytes: True)
    own_id = response("ann")["id"]
    assert await kept.keep("ann", 0, response("ann"), SAID)
    assert [item["type"] for item in await kept.conversation(own_id)] == ["message", "message"]
    (path,) = (tmp_path / "state").rglob("*.json")
    path.write_bytes(path.read_bytes()[:-1])
    for look in (kept.get, kept.conversation):
        with pytest.raises(NotFound):
            await look(own_id)
    await kept.delete(own_id)
    assert not path.exists()


async def test_a_disk_that_fails_or_is_full_keeps_nothing(
    documents: Documents, tmp_path: Path
) -> None:
    full = Responses(documents, lambda num_bytes: False)
    assert not await full.keep("ann", 0, response("ann"), SAID)
    (tmp_path / "state" / "tmp").rmdir()
    failing = Responses(documents, lambda num_bytes: True)
    assert not await failing.keep("ann", 0, response("ann"), SAID)
    assert not list(documents.ids())
