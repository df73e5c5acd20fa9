"""What is installed is what was pinned, to the byte."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

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


@pytest.mark.requirement("S-29")
def test_the_audit_looks_at_every_lock(tmp_path: Path) -> None:
    """With a `uvx` that only says what it was asked to do: the real one asks the network."""
    (tmp_path / "uvx").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "uvx").chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    said = subprocess.run(
        ["make", "-s", "audit"], cwd=ROOT, env=environ, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    locks = sorted(path.name for path in (ROOT / "requirements").glob("*.txt"))
    assert sorted(line.rpartition("/")[2] for line in said) == locks
    assert all(line.startswith("pip-audit ") and "--require-hashes" in line for line in said)


@pytest.mark.requirement("L-12")
@pytest.mark.parametrize("name", ["hypercorn", "mlx", "mlx-lm", "llguidance"])
def test_what_is_known_from_inside_is_held_to_a_minor_version(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (held,) = [text for text in project["dependencies"] if re.match(rf"{name}[<>=]", text)]
    low, high = re.findall(r"(\d+)\.(\d+)", held)
    assert low[0] == high[0] and int(high[1]) == int(low[1]) + 1 and "<" in held
