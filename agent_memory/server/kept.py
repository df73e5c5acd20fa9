"""Files and batches as they are kept.  Worker threads."""

import time
from collections.abc import Iterable

from agent_memory.store.documents import Document, Documents
from agent_memory.store.files import Piece, write_new

FILES = "files"
BATCHES = "batches"


def keep(
    files: Documents, file_id: str, filename: str, purpose: str, pieces: Iterable[Piece]
) -> Document:
    """A file by this id, in place of one of before.  Raises OSError."""
    path = files.data(file_id)
    path.unlink(missing_ok=True)
    try:
        write_new(path, pieces)
        told = {
            "id": file_id,
            "object": "file",
            "bytes": path.stat().st_size,
            "created_at": int(time.time()),
            "expires_at": None,
            "filename": filename,
            "purpose": purpose,
            "status": "processed",
        }
        files.put(file_id, told)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return told


def everyone(documents: Documents) -> list[Document]:
    """The newest first."""
    found = [one for doc_id in documents.ids() if (one := documents.get(doc_id))]
    return sorted(found, key=lambda one: int(one["created_at"]), reverse=True)
