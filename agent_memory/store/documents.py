"""What clients leave with the server and come back for: responses, batches, files.

Each is a JSON object by its id, and may have bytes beside it.  A document is there whole or not at
all, whatever happens while it is written.  Knows files and nothing of what they mean.  Any thread,
but the event loop's only through another one: it waits for the disk.

    documents/<kind>/<id>.json   documents/<kind>/<id>.data
"""

import json
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agent_memory.store import files
from agent_memory.store.state_dir import StateDir, private_folder

_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")

Document = dict[str, Any]


class Documents:
    """Of one kind.  Ids from outside may be anything: what cannot be one is not there."""

    def __init__(self, state: StateDir, kind: str) -> None:
        self._folder = state.documents / kind
        self._tmp = state.tmp
        private_folder(state.documents)
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
        found = [(path.stat().st_mtime_ns, path.stem) for path in self._folder.glob("*.json")]
        return (doc_id for _, doc_id in sorted(found, reverse=True))

    def data(self, doc_id: str) -> Path:
        """Where the bytes of a document are, or are to be."""
        assert _ID.fullmatch(doc_id)
        return self._folder / f"{doc_id}.data"

    def _path(self, doc_id: str) -> Path:
        assert _ID.fullmatch(doc_id)
        return self._folder / f"{doc_id}.json"
