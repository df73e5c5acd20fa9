"""What the documents say of the code is so."""

import re
from collections.abc import Iterator
from pathlib import Path

from agent_memory import __version__
from agent_memory.config import SETTINGS
from tests.source import ROOT, package_files


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def tree_entries() -> Iterator[tuple[Path, str]]:
    """(path, comment) of each line of the README's tree, in which two spaces indent."""
    tree = read("README.md").split("```\nagent_memory/\n")[1].split("```")[0]
    folders = ["agent_memory"]
    for indent, name, comment in re.findall(r"^((?:  )*)(\S+) *(.*)$", tree, re.MULTILINE):
        folders[len(indent) // 2 :] = [name]
        yield Path(*folders), comment


def test_the_readme_names_every_module_and_says_what_it_is() -> None:
    named = dict(tree_entries())
    modules = {file for file in package_files() if not file.name.startswith("__")}
    assert {path for path in named if path.parts[0] == "agent_memory" and path.suffix} == modules
    assert not [path for path in modules if not named[path]]


def test_the_changelog_begins_with_this_version() -> None:
    changelog = read("CHANGELOG.md")
    versions = re.findall(r"^## (\S+)", changelog, re.MULTILINE)
    assert versions[0] == __version__
    assert set(re.findall(r"^### (.*)", changelog, re.MULTILINE)) <= {"Added", "Changed", "Fixed"}


def test_every_setting_is_documented_as_it_is() -> None:
    rows = [line for line in read("docs/settings.md").splitlines() if line.startswith("| `")]
    assert len(rows) == len(SETTINGS)
    for row, setting in zip(rows, SETTINGS, strict=True):
        flag = "--no-preload" if setting.name == "preload" else setting.flag
        assert row == (
            f"| `{setting.name}`, `{flag}` | `{setting.variable}` | {setting.allowed} "
            f"| {setting.default} | {setting.text} |"
        )
