"""The plots: one for each part that has something to show, the same bytes each time."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from agent_memory.bench import results
from tests.bench import samples

plots = pytest.importorskip("agent_memory.bench.plots", reason="matplotlib is not installed")


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    found = samples.results(samples.ALL)
    drawn = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        files = plots.draw(found, tmp_path / name)
        assert [file.stem for file in files] == list(plots.PLOTS)
        drawn.append([file.read_bytes() for file in files])
    assert drawn[0] == drawn[1]
    for svg in drawn[0]:
        assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
        assert b"<dc:date>" not in svg


def test_what_was_not_measured_is_not_drawn_nor_left_from_before(tmp_path: Path) -> None:
    (tmp_path / "switch.svg").write_text("of an earlier run")
    (tmp_path / "mine.svg").write_text("somebody else's")
    assert results.draw(samples.results({"pressure": samples.growth}), tmp_path) == []
    assert [file.name for file in tmp_path.iterdir()] == ["mine.svg"]
    for empty in plots.PLOTS:
        assert plots.draw(samples.results({empty: lambda _: None}), tmp_path) == []
