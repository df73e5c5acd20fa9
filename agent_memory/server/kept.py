"""Files and batches as they are kept.  Worker threads."""

import time
from collections.abc import Iterable

import structlog

from agent_memory.store.documents import Document, Documents
from agent_memory.store.files import Piece, write_new

FILES = "files"
BATCHES = "batches"

log = structlog.get_logger(__name__)


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


def found(documents: Documents, doc_id: str) -> Document | None:
    """A damaged one is as good as none."""
    try:
        return documents.get(doc_id)
    except ValueError:
        log.warning("document_damaged", id=doc_id)
        return None


def everyone(documents: Documents) -> list[Document]:
    """The newest first."""
    there = [one for doc_id in documents.ids() if (one := found(documents, doc_id))]
    return sorted(there, key=lambda one: int(one["created_at"]), reverse=True)
