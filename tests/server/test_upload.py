"""Bodies that go to disk as they arrive."""

import asyncio
import os
from collections.abc import Iterable
from pathlib import Path

import pytest
from starlette.datastructures import Headers
from starlette.types import Message, Receive

from agent_memory.errors import Refused
from agent_memory.server import upload
from agent_memory.server.upload import Place, check_type, spool


def receiving(pieces: Iterable[bytes], *, then: Message) -> Receive:
    messages = [{"type": "http.request", "body": p, "more_body": True} for p in pieces]
    waiting = iter([*messages, then])

    async def receive() -> Message:
        return next(waiting)

    return receive


END: Message = {"type": "http.request", "body": b"end", "more_body": False}
GONE: Message = {"type": "http.disconnect"}


async def test_what_arrives_is_in_the_file_and_the_file_has_no_name(tmp_path: Path) -> None:
    pieces = [bytes([n]) * 300_000 for n in range(10)]
    file = await spool(receiving(pieces, then=END), Place(tmp_path, lambda num_bytes: True))
    assert file is not None
    with file:
        assert file.read() == b"".join(pieces) + b"end"
        assert not os.listdir(tmp_path)


async def test_a_client_that_goes_leaves_nothing(tmp_path: Path) -> None:
    assert await spool(receiving([b"x"], then=GONE), Place(tmp_path, lambda n: True)) is None
    assert not os.listdir(tmp_path)


@pytest.mark.requirement("S-10")
async def test_what_must_stay_free_stays_free(tmp_path: Path) -> None:
    asked: list[int] = []

    def has_room(num_bytes: int) -> bool:
        asked.append(num_bytes)
        return len(asked) < 3

    with pytest.raises(Refused) as caught:
        await spool(receiving([bytes(1 << 20)] * 9, then=END), Place(tmp_path, has_room))
    assert caught.value.status == 507 and caught.value.close
    assert asked == [1 << 20] * 3


async def test_silence_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent() -> Message:
        await asyncio.sleep(60)
        return END

    monkeypatch.setattr(upload, "SILENCE_S", 0.05)
    with pytest.raises(Refused) as caught:
        await spool(silent, Place(tmp_path, lambda n: True))
    assert caught.value.status == 408


@pytest.mark.requirement("S-02")
@pytest.mark.parametrize("text", ["", "text/plain", "application/json", "multipart/form-data"])
def test_types_a_form_could_send_are_refused(text: str) -> None:
    with pytest.raises(Refused):
        check_type(Headers({"content-type": text}), upload.PATH)
    check_type(Headers({"content-type": "application/x-tar; charset=binary"}), upload.PATH)
