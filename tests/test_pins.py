"""What is installed is what was pinned, to the byte."""

import re
import tomllib

import pytest

from tests.source import ROOT

PIN = re.compile(r"[A-Za-z0-9._-]+(\[[a-z0-9,-]+\])?==\S+( ; .+)?( --hash=sha256:[0-9a-f]{64})+")


@pytest.mark.requirement("S-28")
@pytest.mark.parametrize("backend", ["default", "cuda"])
def test_every_package_is_one_version_with_its_hashes(backend: str) -> None:
    text = (ROOT / f"requirements/{backend}.txt").read_text("utf-8")
    lines = re.sub(r" *\\\n *", " ", text).splitlines()
    packages = [line for line in lines if line and not line.startswith("#")]
    assert len(packages) > 20
    assert not [line for line in packages if not PIN.fullmatch(line.strip())]


@pytest.mark.requirement("S-28")
def test_make_installs_nothing_else() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    installs = re.findall(r"^.*pip install.*$", makefile, re.MULTILINE)
    assert len(installs) == 4
    assert all("--require-hashes" in line or "--no-deps" in line for line in installs)


@pytest.mark.requirement("L-12")
@pytest.mark.parametrize("name", ["hypercorn", "mlx", "mlx-lm", "llguidance"])
def test_what_is_known_from_inside_is_held_to_a_minor_version(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (held,) = [text for text in project["dependencies"] if re.match(rf"{name}[<>=]", text)]
    low, high = re.findall(r"(\d+)\.(\d+)", held)
    assert low[0] == high[0] and int(high[1]) == int(low[1]) + 1 and "<" in held
