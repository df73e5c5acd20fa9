"""The repository's own Python, read as text and as trees, for the tests of its rules."""

import ast
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]


@cache
def python_files() -> tuple[Path, ...]:
    """Every Python file that git tracks or would track, relative to the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return tuple(Path(name) for name in sorted(set(names.split())) if (ROOT / name).exists())


@cache
def text(file: Path) -> str:
    return (ROOT / file).read_text("utf-8")


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(text(file), str(file))


def package_files() -> list[Path]:
    return [file for file in python_files() if file.parts[0] == "agent_memory"]
