"""A folder as a power cut would have left it, from what a disk has written down.

Two kinds of disk.  *Ordered*: what was done is there, in order, up to the cut.  *Unordered*: what
was not yet forced to be there is there or not, each for itself: the bytes of a file until its
fsync, or some of them, or zeros instead; a name made, moved or removed until its folder's fsync.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.faults.disk import Op


@dataclass
class Tree:
    """Folders and the bytes of files, by path from the root."""

    folders: set[str] = field(default_factory=set)
    files: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, root: Path) -> "Tree":
        tree = cls()
        for path in sorted(root.rglob("*")):
            name = os.fspath(path.relative_to(root))
            if path.is_dir():
                tree.folders.add(name)
            elif not name.endswith("-shm"):  # SQLite makes it anew
                tree.files[name] = path.read_bytes()
        return tree

    def write(self, root: Path) -> None:
        root.mkdir(mode=0o700)
        for folder in sorted(self.folders):
            (root / folder).mkdir(mode=0o700)
        for name, data in self.files.items():
            (root / name).write_bytes(data)


def cut(base: Tree, log: Sequence[Op], rng: Random | None) -> Tree:
    """The folder after the operations of `log` and a power cut; unordered if there is an `rng`."""
    contents = dict(enumerate(base.files.values()))
    names = {name: number for number, name in enumerate(base.files)}
    numbers: dict[int, int] = {}  # those of the log to ours
    folders = set(base.folders)

    def ours(op: Op) -> int:
        if op.number not in numbers:
            numbers[op.number] = names.get(op.path, len(contents))
            contents.setdefault(numbers[op.number], b"")
        return numbers[op.number]

    def has_folder(name: str) -> bool:
        return os.path.dirname(name) in folders | {""}

    for op, kept in zip(log, _kept(log, rng), strict=True):
        if op.kind in ("create", "rename", "write"):
            number = ours(op)
        match op.kind:
            case "create" if kept and has_folder(op.path):
                names[op.path] = number
            case "write":
                contents[number] = _after_write(contents[number], op, kept, rng)
            case "rename" if kept and op.path in folders and has_folder(op.target):
                _move_folder(op, folders, names)
            case "rename" if kept and has_folder(op.target):
                names[op.target] = names.pop(op.path, number)
            case "unlink" if kept:
                names.pop(op.path, None)
            case "mkdir" if kept and has_folder(op.path):
                folders.add(op.path)
            case "index":
                for name, data in op.files:
                    names.pop(name, None)
                    if data is not None:
                        names[name] = len(contents)
                        contents[len(contents)] = data
    return Tree(folders, {name: contents[number] for name, number in names.items()})


def _kept(log: Sequence[Op], rng: Random | None) -> list[bool]:
    """Of each operation whether it survives, looking back from the cut."""
    synced: set[object] = set()
    kept = []
    for op in reversed(log):
        if op.kind == "sync_folder":
            synced.add(op.path)
        elif op.kind == "fsync":
            synced.add(op.number)
        place = op.number if op.kind == "write" else os.path.dirname(op.target or op.path)
        sure = rng is None or op.kind == "index" or place in synced
        kept.append(sure or bool(rng and rng.random() < 0.5))
    return kept[::-1]


def _after_write(content: bytes, op: Op, kept: bool, rng: Random | None) -> bytes:
    if kept:
        data = op.data
    else:
        assert rng is not None
        part = op.data[: rng.randrange(len(op.data) + 1)]
        data = rng.choice([b"", part, part + bytes(len(op.data) - len(part)), bytes(len(op.data))])
    if not data:
        return content
    content = content.ljust(op.offset, b"\0")
    return content[: op.offset] + data + content[op.offset + len(data) :]


def _move_folder(op: Op, folders: set[str], names: dict[str, int]) -> None:
    inside = f"{op.path}/"
    for name in [name for name in folders if name == op.path or name.startswith(inside)]:
        folders.remove(name)
        folders.add(op.target + name[len(op.path) :])
    for name in [name for name in names if name.startswith(inside)]:
        names[op.target + name[len(op.path) :]] = names.pop(name)
