"""Batches at work: each line a request of low priority through the routes, a few at a time.

    validating ─► in_progress ─► finalizing ─► completed
                      ├─► (its time is over) ─► expired
                      └─► cancelling ─► cancelled

What a line was answered goes to the batch's journal; the output files are made of it at the end, by
names that the batch gives them, so that doing it again does no harm.  What is under way when the
process ends, however it ends, is taken up by the next one.  Event loop; the disk is waited for in
worker threads.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any, TypeVar

import structlog
from starlette.types import ASGIApp

from agent_memory.errors import Conflict
from agent_memory.request import Priority
from agent_memory.server import batch_lines, inside, kept
from agent_memory.server.batch_lines import Journal, Line
from agent_memory.server.identity import PRIORITY
from agent_memory.server.inside import Answered
from agent_memory.store.documents import Document, Documents

AT_ONCE = 8
QUEUE_SHARE = 4
"""One part in so many of the queue's places is the most that lines take."""
AGAIN_S = 30.0
MOST_WAIT_S = 5.0
STOP_S = 0.3
ENDED = ("completed", "failed", "expired", "cancelled")
WHY = {
    "expired": "The batch expired before this line was answered.",
    "cancelled": "The batch was cancelled before this line was answered.",
}

T = TypeVar("T")
log = structlog.get_logger(__name__)


class Batches:
    """`state`: what routes find in `request.state`."""

    def __init__(
        self,
        app: ASGIApp,
        documents: Mapping[str, Documents],
        state: Callable[[], Mapping[str, object]],
        max_requests: int,
    ) -> None:
        self._app = app
        self._documents = documents
        self._state = state
        self._at_once = max(1, min(AT_ONCE, max_requests // QUEUE_SHARE))
        self._room = asyncio.Semaphore(self._at_once)
        self._runs: dict[str, BatchRun] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = False

    async def start(self) -> None:
        """Go on with what was under way."""
        self._open = True
        for batch in reversed(await asyncio.to_thread(self._unfinished)):
            self._begin(batch)

    async def stop(self) -> None:
        """Leave everything as it is; nothing is waited for but what is being written."""
        self._open = False
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=STOP_S)

    async def add(self, batch: Document) -> None:
        """Raises OSError."""
        await asyncio.to_thread(self._documents[kept.BATCHES].put, batch["id"], batch)
        if self._open:
            self._begin(batch)

    async def cancel(self, batch_id: str) -> Document | None:
        """None if it is not under way.  Raises OSError."""
        run = self._runs.get(batch_id)
        return await run.cancel() if run else None

    def now(self, batch: Document) -> Document:
        """As it is now, where it was read from disk."""
        run = self._runs.get(batch["id"])
        return run.batch if run else batch

    def reads(self, file_id: str) -> bool:
        return any(run.batch["input_file_id"] == file_id for run in self._runs.values())

    def _unfinished(self) -> list[Document]:
        self._documents[kept.FILES].sweep()
        found = kept.everyone(self._documents[kept.BATCHES])
        return [batch for batch in found if batch["status"] not in ENDED]

    def _begin(self, batch: Document) -> None:
        run = BatchRun(batch, self._documents, self._answer, self._at_once)
        self._runs[batch["id"]] = run
        task = asyncio.create_task(self._whole(run))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _whole(self, run: "BatchRun") -> None:
        """Whatever fails, a full disk above all, is tried again."""
        log.info("batch_begun", batch=run.batch["id"], status=run.batch["status"])
        while run.batch["status"] not in ENDED:
            try:
                await run.go_on()
            except Exception:
                log.exception("batch_halted", batch=run.batch["id"], again_s=AGAIN_S)
                await asyncio.sleep(AGAIN_S)
        del self._runs[run.batch["id"]]
        counts = run.batch["request_counts"]
        log.info("batch_ended", batch=run.batch["id"], status=run.batch["status"], **counts)

    async def _answer(self, path: str, asked: dict[str, Any], request_id: str) -> Answered:
        """Who has no place for it now is asked again; until then others have its room, for it may
        be a model that never comes."""
        while True:
            state = {**self._state(), "request_id": request_id}
            headers = {PRIORITY: Priority.BACKGROUND}
            async with self._room:
                answered = await inside.post(self._app, path, asked, headers, state)
            if answered.status != 503:
                return answered
            wait_s = float(answered.headers.get("retry-after", MOST_WAIT_S))
            await asyncio.sleep(min(wait_s, MOST_WAIT_S))


Answer = Callable[[str, dict[str, Any], str], Any]


class BatchRun:
    """One batch, with so many lines under way `at_once`.  `batch` is the document as it is now; who
    changes it writes it."""

    def __init__(
        self,
        batch: Document,
        documents: Mapping[str, Documents],
        answer: Answer,
        at_once: int,
    ) -> None:
        self.batch = batch
        self._documents = documents
        self._answer = answer
        self._places = asyncio.Semaphore(at_once)
        self._input = documents[kept.FILES].data(batch["input_file_id"])
        self._journal = Journal(documents[kept.BATCHES].data(batch["id"]))
        self._writing = asyncio.Lock()
        self._lines: asyncio.Task[None] | None = None
        self._late = False

    async def cancel(self) -> Document:
        """Raises Conflict if its files are being made."""
        if self.batch["status"] not in ("validating", "in_progress", "cancelling"):
            raise Conflict(f"The batch is {self.batch['status']} already.", code="batch_ended")
        self._mark("cancelling")
        if self._lines is not None:
            self._lines.cancel()
        await self._write()
        return self.batch

    async def go_on(self) -> None:
        """Until it has ended.  Cancelling this leaves it to be gone on with.  Raises OSError."""
        if not await asyncio.to_thread(self._input.exists):
            error = {"code": "file_not_found", "message": "Its input file is gone."}
            self.batch["errors"] = {"object": "list", "data": [error]}
            await self._last(lambda: self._ended_as("failed"))
            return
        if self.batch["status"] == "validating":
            self._mark("in_progress")
            await self._write()
        if self.batch["status"] == "in_progress":
            await self._answer_lines()
        if self.batch["status"] == "in_progress":
            self._mark("finalizing")
            if not self._late:  # else the clock will say so again
                await self._write()
        whole = "expired" if self._late else "completed"
        status = "cancelled" if self.batch["status"] == "cancelling" else whole
        await self._last(lambda: self._end(status))

    async def _answer_lines(self) -> None:
        lines = self._lines = asyncio.create_task(self._every_line())
        try:
            await asyncio.wait({lines}, timeout=max(0.0, self.batch["expires_at"] - time.time()))
            self._late = not lines.done()
        finally:
            lines.cancel()
            await asyncio.wait({lines})
        if not lines.cancelled():
            lines.result()

    async def _every_line(self) -> None:
        done = await asyncio.to_thread(self._journal.done)
        counts = self.batch["request_counts"]
        counts["completed"] = sum(done.values())
        counts["failed"] = len(done) - counts["completed"]
        async with asyncio.TaskGroup() as group:
            async for line in _read(self._input_lines()):
                if line.number not in done:
                    await self._places.acquire()
                    task = group.create_task(self._one(line))
                    task.add_done_callback(lambda _: self._places.release())

    def _input_lines(self) -> Iterator[Line]:
        return batch_lines.lines(self._input, self.batch["endpoint"])

    async def _one(self, line: Line) -> None:
        request_id = f"{self.batch['id']}-{line.number}"
        if line.asked is None:
            good, told = False, _unanswered(request_id, line)
        else:
            answered = await self._answer(self.batch["endpoint"], line.asked, request_id)
            good, told = answered.status == 200, _answered(request_id, line, answered)
        await _surely(lambda: self._journal.add(line.number, good, told))
        self.batch["request_counts"]["completed" if good else "failed"] += 1

    def _end(self, status: str) -> None:
        """A worker thread; nothing else touches the batch any more."""
        done = self._journal.done()
        missing = (
            batch_lines.as_line(_unanswered(f"{self.batch['id']}-{line.number}", line, status))
            for line in self._input_lines()
            if line.number not in done
        )
        num_good = sum(done.values())
        counts = self.batch["request_counts"]
        counts["completed"], counts["failed"] = num_good, counts["total"] - num_good
        if num_good:
            self._keep("output_file_id", self._journal.entries(good=True))
        if counts["failed"]:
            self._keep("error_file_id", _both(self._journal.entries(good=False), missing))
        self._ended_as(status)
        self._journal.remove()

    def _ended_as(self, status: str) -> None:
        """It is so only when it is written.  A worker thread.  Raises OSError."""
        ended = {**self.batch, "status": status, f"{status}_at": int(time.time())}
        self._documents[kept.BATCHES].put(ended["id"], ended)
        self.batch.update(ended)

    def _keep(self, field: str, lines: Iterator[bytes]) -> None:
        kind = field.removesuffix("_file_id")
        file_id = f"file-{self.batch['id'].removeprefix('batch_')}-{kind}"
        filename = f"{self.batch['id']}_{kind}.jsonl"
        kept.keep(self._documents[kept.FILES], file_id, filename, "batch_output", lines)
        self.batch[field] = file_id

    def _mark(self, status: str) -> None:
        self.batch["status"] = status
        self.batch[f"{status}_at"] = int(time.time())

    async def _last(self, end: Callable[[], None]) -> None:
        """What is written before it, such as that the batch is being cancelled, is not written
        over it."""
        async with self._writing:
            await _surely(end)

    async def _write(self) -> None:
        async with self._writing:
            batch = json.loads(json.dumps(self.batch))
            put = self._documents[kept.BATCHES].put
            await _surely(lambda: put(batch["id"], batch))


def _answered(request_id: str, line: Line, answered: Answered) -> dict[str, Any]:
    return {
        "id": request_id,
        "custom_id": line.custom_id,
        "response": {
            "status_code": answered.status,
            "request_id": request_id,
            "body": json.loads(answered.body),
        },
        "error": None,
    }


def _unanswered(request_id: str, line: Line, status: str | None = None) -> dict[str, Any]:
    """`status`: of a batch that ended before the line was looked at."""
    if status is None:
        assert line.error is not None
        error = {"code": line.error.code, "message": f"Line {line.number}: {line.error.message}"}
    else:
        error = {"code": f"batch_{status}", "message": WHY[status]}
    return {"id": request_id, "custom_id": line.custom_id, "response": None, "error": error}


async def _read(lines: Iterator[Line]) -> AsyncIterator[Line]:
    while (line := await asyncio.to_thread(next, lines, None)) is not None:
        yield line


def _both(first: Iterator[bytes], second: Iterator[bytes]) -> Iterator[bytes]:
    yield from first
    yield from second


async def _surely(call: Callable[[], T]) -> T:
    """In a worker thread, to its end: what is being written is written whoever waits for it."""
    running = asyncio.ensure_future(asyncio.to_thread(call))
    try:
        return await asyncio.shield(running)
    finally:
        if not running.done():
            await asyncio.wait({running})
