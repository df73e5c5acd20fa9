"""A block file that can be read whatever becomes of its name.

Knows that a second name in `tmp/` keeps a file's bytes when the writer deletes the first: an agent
may go on, be rewound or deleted while it is exported.  What a crash leaves behind, the next start
sweeps.  Any thread.
"""

import errno
import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from agent_memory.kv_spec import KVSpec
from agent_memory.store.files import Bytes, read_file
from agent_memory.store.format import BlockFile, decode
from agent_memory.store.state_dir import StateDir

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


class HeldFile:
    """Close it.  Raises FileNotFoundError when made if the file has gone already."""

    def __init__(self, state: StateDir, file: BlockFile) -> None:
        self.file = file
        self._path = state.tmp / secrets.token_hex(8)
        _keep(state.block_path(file.block.hash), self._path)

    def read(self, spec: KVSpec) -> Bytes:
        """The whole file.  Raises Rejected unless it is the block it should be, and OSError."""
        raw = read_file(self._path)
        decode(raw, self.file, spec)
        return raw

    def close(self) -> None:
        with suppress(OSError):
            self._path.unlink()


def _keep(path: Path, second: Path) -> None:
    try:
        os.link(path, second, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(path, second, follow_symlinks=False)
