"""A batch at work, in this process, on a disk that takes its time."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

from agent_memory.server import kept
from agent_memory.server.batch_runner import BatchRun
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


async def test_cancelled_is_what_stays_written(tmp_path: Path) -> None:
    state = StateDir.open(tmp_path / "state")
    private_folder(state.tmp)
    documents = {kind: SlowDocuments(state, kind) for kind in (kept.FILES, kept.BATCHES)}
    asked = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    raw = json.dumps({**asked, "body": body}).encode()
    kept.keep(documents[kept.FILES], "file-in", "in.jsonl", "batch", [raw])
    counts = {"total": 1, "completed": 0, "failed": 0}
    batch: Document = {
        "id": "batch_one",
        "endpoint": "/v1/chat/completions",
        "input_file_id": "file-in",
        "status": "validating",
        "expires_at": time.time() + 60,
        "request_counts": counts,
    }
    asked_of = asyncio.Event()

    async def unanswered(_path: str, _asked: dict[str, Any], _request_id: str) -> Answered:
        asked_of.set()
        await asyncio.sleep(60)
        raise AssertionError("it was to be cancelled")

    run = BatchRun(batch, documents, unanswered, asyncio.Semaphore(1))
    going_on = asyncio.create_task(run.go_on())
    await asked_of.wait()
    await run.cancel()
    await going_on
    written = documents[kept.BATCHES].get("batch_one")
    assert written is not None and written["status"] == run.batch["status"] == "cancelled"
    assert written["request_counts"]["failed"] == 1
    state.close()
