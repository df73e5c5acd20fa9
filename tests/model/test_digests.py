"""A changed file is another model; an unchanged one is not read twice."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from agent_memory.model.digests import MOST_KEPT, model_digest


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's files, the weights a large one."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (folder / name).write_bytes(name.encode())
    os.truncate(folder / "model.safetensors", 32 << 20)
    monkeypatch.setattr("agent_memory.model.digests._SETTLED_NS", 0)
    return folder


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "digests.json"


@pytest.fixture
def opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the model's files as they are opened."""
    names: list[str] = []
    plain: Any = Path.open

    def counted(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.parent == folder:
            names.append(path.name)
        return plain(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", counted)
    yield names


def test_unchanged_files_are_read_once(folder: Path, kept: Path, opened: list[str]) -> None:
    first = model_digest(folder, kept)
    assert sorted(opened) == ["config.json", "model.safetensors", "tokenizer.json"]
    opened.clear()
    assert model_digest(folder, kept) == first == model_digest(folder, kept)
    assert opened == []
    assert model_digest(folder) == first  # what is kept is no part of it
    assert not list(kept.parent.glob("*.new"))


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")


def flip_and_set_the_time_back(path: Path) -> None:
    stat = path.stat()
    flip(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def replace_by_one_as_long(path: Path) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(path.read_bytes())
    flip(new)
    os.utime(new, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    new.replace(path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("change", [flip, flip_and_set_the_time_back, replace_by_one_as_long])
def test_a_changed_file_changes_the_digest(
    change: Callable[[Path], None], name: str, folder: Path, kept: Path
) -> None:
    first = model_digest(folder, kept)
    change(folder / name)
    assert model_digest(folder, kept) != first
    assert model_digest(folder, kept) == model_digest(folder)


def test_a_file_just_written_is_read_again(
    folder: Path, kept: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent_memory.model.digests._SETTLED_NS", 60_000_000_000)
    model_digest(folder, kept)
    opened.clear()
    model_digest(folder, kept)
    assert len(opened) == 3


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"a": 1}', '{"a": "zz"}', '{"a": "00"}', "\0" * 100, "[" * 9999],
)
def test_an_odd_file_is_ignored_and_replaced(
    text: str, folder: Path, kept: Path, opened: list[str]
) -> None:
    kept.write_text(text)
    with capture_logs():
        assert model_digest(folder, kept) == model_digest(folder)
    opened.clear()
    model_digest(folder, kept)
    assert opened == []


def test_a_place_that_cannot_be_written_is_told(folder: Path, tmp_path: Path) -> None:
    with capture_logs() as logs:
        assert model_digest(folder, tmp_path / "no" / "digests.json") == model_digest(folder)
    assert [log["event"] for log in logs] == ["digests_not_kept"]


def test_no_more_is_kept_than_some(folder: Path, kept: Path) -> None:
    kept.write_text("{" + ",".join(f'"{n}": "{n:032x}"' for n in range(MOST_KEPT)) + "}")
    model_digest(folder, kept)
    text = kept.read_text()
    assert text.count(":") and len(text.splitlines()) - 2 == MOST_KEPT
    assert '"0"' not in text and f'"{MOST_KEPT - 1}"' in text
