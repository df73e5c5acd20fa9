"""What clients leave with the server and come back for: responses, batches, files.

Each is a JSON object by its id, and may have bytes beside it.  A document is there whole or not at
all, whatever happens while it is written.  Knows files and nothing of what they mean.  Any thread,
but the event loop's only through another one: it waits for the disk.

    documents/<kind>/<id>.json                    documents/<kind>/<id>.data
    documents/tenants/<tenant>/<kind>/<id>.json   those of a tenant

The id of a response begins with its owner's mark, so that an agent's are found without reading.
"""

import json
import re
import secrets
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

from agent_memory.store import files
from agent_memory.store.state_dir import StateDir, private_folder
from agent_memory.tenants import is_name

RESPONSES = "responses"
TENANTS = "tenants"
MARK_CHARS = 16
_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")

Document = dict[str, Any]


def response_ids_of(agent: str | None) -> str:
    """What the ids of its responses begin with; None: nobody's."""
    if agent is None:
        return "resp_" + MARK_CHARS * "0"
    return "resp_" + blake2b(agent.encode(), digest_size=MARK_CHARS // 2).hexdigest()


class Documents:
    """Of one kind and tenant.  Ids from outside may be anything: what is none is not there."""

    def __init__(self, state: StateDir, kind: str, tenant: str | None = None) -> None:
        assert kind != TENANTS and (tenant is None or is_name(tenant))
        self._tmp = state.tmp
        self._folder = state.documents
        private_folder(self._folder)
        for part in (*((TENANTS, tenant) if tenant else ()), kind):
            self._folder /= part
            private_folder(self._folder)

    def put(self, doc_id: str, document: Document) -> None:
        """On disk when this returns.  Raises OSError."""
        text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
        written = self._tmp / f"{secrets.token_hex(8)}.json"
        try:
            files.write_new(written, [text.encode()])
            written.rename(self._path(doc_id))
        except OSError:
            written.unlink(missing_ok=True)
            raise
        files.sync_folder(self._folder)

    def get(self, doc_id: str) -> Document | None:
        """Raises OSError, and ValueError for a damaged one."""
        if not _ID.fullmatch(doc_id):
            return None
        try:
            raw = files.read_file(self._path(doc_id))
        except FileNotFoundError:
            return None
        document = json.loads(raw.tobytes())
        if not isinstance(document, dict):
            raise ValueError(f"{self._path(doc_id).name} holds no object")
        return document

    def delete(self, doc_id: str) -> bool:
        """False if there was none.  Raises OSError."""
        if not _ID.fullmatch(doc_id) or not self._path(doc_id).exists():
            return False
        self._path(doc_id).unlink(missing_ok=True)
        self.data(doc_id).unlink(missing_ok=True)
        files.sync_folder(self._folder)
        return True

    def sweep(self) -> None:
        """Remove bytes whose document is not there: who wrote them did not come to an end.  Raises
        OSError."""
        for path in self._folder.glob("*.data"):
            if not path.with_suffix(".json").exists():
                path.unlink(missing_ok=True)

    def ids(self) -> Iterator[str]:
        """Newest first."""
        return (path.stem for _, _, path in self._newest_first())

    def delete_all(self, beginning: str) -> list[int]:
        """All whose ids begin so.  -> the size of each.  Raises OSError."""
        assert _ID.fullmatch(beginning)
        return self._delete(
            (size, path)
            for _, size, path in self._newest_first()
            if path.name.startswith(beginning)
        )

    def trim(self, most: int, most_bytes: int, since: float) -> list[int]:
        """Delete the oldest: those from before the time `since`, and what more there is than
        `most`, or than `most_bytes`.  -> the size of each.  Raises OSError."""
        doomed: list[tuple[int, Path]] = []
        num_bytes = 0
        for number, (written_ns, size, path) in enumerate(self._newest_first()):
            num_bytes += size
            if number >= most or num_bytes > most_bytes or written_ns < since * 1e9:
                doomed.append((size, path))
        return self._delete(doomed)

    def _newest_first(self) -> list[tuple[int, int, Path]]:
        """(when written in ns, bytes, path) of each; its data is not counted."""
        found = []
        for path in self._folder.glob("*.json"):
            try:
                seen = path.stat()
            except FileNotFoundError:
                continue  # deleted meanwhile
            found.append((seen.st_mtime_ns, seen.st_size, path))
        return sorted(found, reverse=True)

    def _delete(self, doomed: Iterable[tuple[int, Path]]) -> list[int]:
        sizes = []
        for size, path in doomed:
            path.unlink(missing_ok=True)
            path.with_suffix(".data").unlink(missing_ok=True)
            sizes.append(size)
        if sizes:
            files.sync_folder(self._folder)
        return sizes

    def data(self, doc_id: str) -> Path:
        """Where the bytes of a document are, or are to be."""
        assert _ID.fullmatch(doc_id)
        return self._folder / f"{doc_id}.data"

    def _path(self, doc_id: str) -> Path:
        assert _ID.fullmatch(doc_id)
        return self._folder / f"{doc_id}.json"
