"""The file an agent is exported to: read as it was written, or not at all."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from xxhash import xxh3_128_hexdigest

from agent_memory.block import BlockHash
from agent_memory.engine import archive
from agent_memory.engine.archive import ArchivedBlock, ArchivedHead, ArchiveReader, Manifest
from agent_memory.errors import BadRequest

HASHES = [BlockHash(bytes([n]) * 32) for n in range(1, 4)]
FILES = [bytes([n]) * (700 * n) for n in range(1, 4)]


def manifest(**changes: Any) -> Manifest:
    whole = Manifest(
        agent="ann",
        model="some/model",
        fingerprint=BlockHash(bytes(32)),
        heads=(
            ArchivedHead(600, ((20, 40), (100, 600)), tuple(HASHES)),
            ArchivedHead(256, (), (HASHES[0],)),
        ),
        blocks=tuple(
            ArchivedBlock(block_hash, len(file), bytes(16))
            for block_hash, file in zip(HASHES, FILES, strict=True)
        ),
    )
    return replace(whole, **changes)


def written(what: Manifest) -> bytes:
    members = (
        archive.member(block.name, file) for block, file in zip(what.blocks, FILES, strict=True)
    )
    return what.head() + b"".join(members) + archive.END


def read(raw: bytes) -> tuple[Manifest, list[bytes]]:
    reader = ArchiveReader(io.BytesIO(raw))
    files = [reader.block(block) for block in reader.manifest.blocks]
    reader.end()
    return reader.manifest, files


def test_what_is_written_is_read() -> None:
    raw = written(manifest())
    assert read(raw) == (manifest(), FILES)
    assert len(raw) == manifest().archive_bytes


def test_any_tar_shows_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(written(manifest()))
    with tarfile.open(tmp_path / "file") as tar:
        names = tar.getnames()
        assert names == [archive.MANIFEST, archive.CHECKSUM, *(b.name for b in manifest().blocks)]
        last = tar.extractfile(names[-1])
        assert last is not None and last.read() == FILES[-1]


def test_no_byte_outside_the_block_files_can_change_unnoticed() -> None:
    raw, files = written(manifest()), b"".join(FILES)
    covered = set(range(len(raw)))
    for file in FILES:  # these have checksums of their own
        start = raw.index(file)
        covered -= set(range(start, start + len(file)))
    assert len(covered) == len(raw) - len(files)
    for at in sorted(covered):
        changed = bytearray(raw)
        changed[at] ^= 0x41
        with pytest.raises(BadRequest) as caught:
            read(bytes(changed))
        assert caught.value.code in ("damaged_export", "not_an_export")


@pytest.mark.parametrize("cut", [0, 1, 511, 512, 1000, 3000, -1, -512, -1024, -1500])
def test_a_file_cut_short_is_refused(cut: int) -> None:
    with pytest.raises(BadRequest):
        read(written(manifest())[:cut])


def test_something_behind_the_end_is_refused() -> None:
    with pytest.raises(BadRequest, match="end where it should"):
        read(written(manifest()) + b"\0")


BLOCKS = manifest().blocks


@pytest.mark.parametrize(
    "changes",
    [
        {"heads": ()},
        {"heads": manifest().heads * 5},
        {"heads": (*manifest().heads, ArchivedHead(0, (), ()))},
        {"heads": (ArchivedHead(600, (), (*HASHES[:2], HASHES[1])),)},
        {"heads": (ArchivedHead(600, (), tuple(HASHES), (BlockHash(bytes(32)),)),)},
        {"heads": (ArchivedHead(769, (), tuple(HASHES)),)},
        {"heads": (ArchivedHead(512, (), tuple(HASHES)),)},
        {"heads": (ArchivedHead(600, ((0, 40),), tuple(HASHES)),)},
        {"heads": (ArchivedHead(600, ((20, 10),), tuple(HASHES)),)},
        {"heads": (ArchivedHead(600, ((20, 601),), tuple(HASHES)),)},
        {"heads": (ArchivedHead(600, ((20, 40), (30, 50)), tuple(HASHES)),)},
        {"blocks": (BLOCKS[0], BLOCKS[1], BLOCKS[1])},
        {"blocks": (*BLOCKS[:2], ArchivedBlock(HASHES[2], 1 << 31, bytes(16)))},
        {"agent": "an\nn"},
        {"agent": "a" * 5000},
    ],
    ids=str,
)
def test_a_manifest_that_does_not_fit_together_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(BadRequest) as caught:
        ArchiveReader(io.BytesIO(manifest(**changes).head()))
    assert caught.value.code == "damaged_export"


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"{}", b"null", b'{"format":1}', b"[" * 100_000, b"\xff"],
    ids=lambda text: repr(text[:9]),
)
def test_a_manifest_that_is_something_else_is_refused(text: bytes) -> None:
    checksum = xxh3_128_hexdigest(text).encode()
    head = archive.member(archive.MANIFEST, text) + archive.member(archive.CHECKSUM, checksum)
    with pytest.raises(BadRequest):
        ArchiveReader(io.BytesIO(head))


def test_another_format_is_named_so() -> None:
    other = manifest().head().replace(b"agent-memory-export/2", b"agent-memory-export/3")
    text = other[512 : 512 + other[512:].index(b"\0")]
    checksum = xxh3_128_hexdigest(text).encode()
    head = archive.member(archive.MANIFEST, text) + archive.member(archive.CHECKSUM, checksum)
    with pytest.raises(BadRequest) as caught:
        ArchiveReader(io.BytesIO(head))
    assert caught.value.code == "not_an_export"
