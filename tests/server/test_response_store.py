"""What is kept of responses, on a real disk."""

from pathlib import Path
from typing import Any

import pytest

from agent_memory.errors import NotFound
from agent_memory.server.response_store import Responses
from agent_memory.store.documents import RESPONSES, Documents, response_ids_of
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
