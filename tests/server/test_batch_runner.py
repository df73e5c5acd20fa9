"""Batches at work, in this process, on a disk that takes its time."""

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from agent_memory.server import batch_runner, kept
from agent_memory.server.batch_runner import AT_ONCE, QUEUE_SHARE, Batches, BatchRun
from agent_memory.server.inside import Answered
from agent_memory.store.documents import Document, Documents
from agent_memory.store.state_dir import StateDir, private_folder

SLOW_S = 0.3


class SlowDocuments(Documents):
    """Where it takes a while to write that a batch is being cancelled."""

    def put(self, doc_id: str, document: Document) -> None:
        if document.get("status") == "cancelling":
            time.sleep(SLOW_S)
        super().put(doc_id, document)


@pytest.fixture
def documents(tmp_path: Path) -> Iterator[dict[str, Documents]]:
    state = StateDir.open(tmp_path / "state")
    private_folder(state.tmp)
    yield {kind: SlowDocuments(state, kind) for kind in (kept.FILES, kept.BATCHES)}
    state.close()


def batch_of(documents: dict[str, Documents], name: str, model: str, num_lines: int) -> Document:
    """A new one that asks this model, with its input file."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}]}
    asked = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    lines = [json.dumps({"custom_id": str(n), **asked}).encode() + b"\n" for n in range(num_lines)]
    kept.keep(documents[kept.FILES], f"file-{name}", "in.jsonl", "batch", lines)
    return {
        "id": f"batch_{name}",
        "endpoint": "/v1/chat/completions",
        "input_file_id": f"file-{name}",
        "status": "validating",
        "expires_at": time.time() + 60,
        "request_counts": {"total": num_lines, "completed": 0, "failed": 0},
    }


async def test_cancelled_is_what_stays_written(documents: dict[str, Documents]) -> None:
    asked_of = asyncio.Event()

    async def unanswered(_path: str, _asked: dict[str, Any], _request_id: str) -> Answered:
        asked_of.set()
        await asyncio.sleep(60)
        raise AssertionError("it was to be cancelled")

    run = BatchRun(batch_of(documents, "one", "any", 1), documents, unanswered, 1)
    going_on = asyncio.create_task(run.go_on())
    await asked_of.wait()
    await run.cancel()
    await going_on
    written = documents[kept.BATCHES].get("batch_one")
    assert written is not None and written["status"] == run.batch["status"] == "cancelled"
    assert written["request_counts"]["failed"] == 1


async def test_a_batch_whose_model_does_not_come_holds_up_no_other(
    documents: dict[str, Documents], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_runner, "MOST_WAIT_S", 60.0)
    refused, all_wait = list[str](), asyncio.Event()

    async def answer(request: Request) -> Response:
        if (await request.json())["model"] == "good":
            return JSONResponse({})
        refused.append(request.state.request_id)
        if len(refused) == AT_ONCE:
            all_wait.set()
        return JSONResponse({}, 503, {"Retry-After": "60"})

    app = Starlette(routes=[Route("/v1/chat/completions", answer, methods=["POST"])])
    batches = Batches(app, documents, dict, 2 * AT_ONCE * QUEUE_SHARE)
    await batches.start()
    stuck = batch_of(documents, "stuck", "bad", 3 * AT_ONCE)
    await batches.add(stuck)
    async with asyncio.timeout(30):
        await all_wait.wait()
        good = batch_of(documents, "good", "good", 3 * AT_ONCE)
        await batches.add(good)
        while batches.reads(good["input_file_id"]):
            await asyncio.to_thread(time.sleep, 0.01)
    assert good["request_counts"]["completed"] == 3 * AT_ONCE
    assert len(refused) == AT_ONCE and stuck["status"] == "in_progress"
    await batches.stop()
