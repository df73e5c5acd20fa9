"""Every promise of docs/requirements.md is carried by tests, or its row says why not.

A row is `| id | what holds | how it is shown |`.  How is one of: the modules below tests/ whose
tests are marked with the id, each in backticks; a link to what only a Mac can show; or "not built
yet: " and what is missing.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.source import ROOT, python_files, tree

DOCUMENT = ROOT / "docs/requirements.md"
MARKER = "pytest.mark.requirement"
ID = re.compile(r"[A-Z]-\d\d")
ROW = re.compile(r"\| ([A-Z]-\d\d) \| (\S.*?) \| (\S.*?) \|")
NO_ROW = re.compile(r"\| id \| .*\||(\|-+)+\|")
ON_A_MAC = "on a Mac: [on-a-mac.md](on-a-mac.md)"
NOT_BUILT = re.compile(r"not built yet: \S.*")
MODULES = re.compile(r"`\S+\.py`(, `\S+\.py`)*")


@dataclass(frozen=True)
class Row:
    id: str
    shown: str

    @property
    def modules(self) -> set[str]:
        named = MODULES.fullmatch(self.shown)
        return set(re.findall(r"`(\S+\.py)`", self.shown)) if named else set()

    def check(self) -> None:
        known = self.modules or self.shown == ON_A_MAC or NOT_BUILT.fullmatch(self.shown)
        assert known, f"{self.id}: how it is shown is none of the three: {self.shown}"


def rows(document: str) -> list[Row]:
    lines = [line for line in document.splitlines() if line.startswith("|")]
    found = [ROW.fullmatch(line) for line in lines]
    odd = [line for line, row in zip(lines, found, strict=True) if not row]
    assert all(NO_ROW.fullmatch(line) for line in odd), f"not a row: {odd}"
    return [Row(row[1], row[3]) for row in found if row]


def marks(module: ast.Module) -> Iterator[tuple[str, list[ast.Call]]]:
    """(name of a test, its markers of ours)."""
    for node in ast.walk(module):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                name, places = node.name, list[ast.AST](node.decorator_list)
            case ast.Assign(targets=[ast.Name(name)]):
                places = [node.value]
            case _:
                continue
        inside = (inner for place in places for inner in ast.walk(place))
        calls = [inner for inner in inside if isinstance(inner, ast.Call)]
        yield name, [call for call in calls if ast.unparse(call.func) == MARKER]


def carried(module: ast.Module) -> set[str]:
    """The ids that tests of a module carry."""
    ids: set[str] = set()
    for name, calls in marks(module):
        for call in calls:
            assert name.startswith(("test_", "Test")), f"{name} is no test, and carries an id"
            assert call.args and not call.keywords, f"{name}: a marker without an id"
            for arg in call.args:
                is_id = isinstance(arg, ast.Constant) and ID.fullmatch(str(arg.value))
                assert is_id, f"{name}: {ast.unparse(arg)} is no id"
                ids.add(ast.literal_eval(arg))
    num_anywhere = sum(
        isinstance(node, ast.Attribute)
        and node.attr == "requirement"
        and ast.unparse(node) == MARKER
        for node in ast.walk(module)
    )
    assert num_anywhere == sum(len(calls) for _, calls in marks(module)), "a marker of no test"
    return ids


def modules_by_id(files: dict[Path, ast.Module]) -> dict[str, set[str]]:
    """For each id the modules, relative to tests/, in which a test carries it."""
    found: dict[str, set[str]] = defaultdict(set)
    for file, module in files.items():
        for requirement in carried(module):
            found[requirement].add(str(file.relative_to("tests")))
    return dict(found)


def check(document: str, files: dict[Path, ast.Module]) -> None:
    """What the document says and what the tests carry is the same."""
    listed, shown = rows(document), modules_by_id(files)
    ids = [row.id for row in listed]
    assert ids and sorted(set(ids)) == sorted(ids), "an id has two rows"
    unknown = shown.keys() - set(ids)
    assert not unknown, f"carried by tests, but in no row: {unknown}"
    for row in listed:
        row.check()
        there = shown.get(row.id, set())
        assert row.modules == there, f"{row.id}: the row names {row.modules}, tests are in {there}"


def numbers(document: str, group: str) -> list[int]:
    return [int(row.id[2:]) for row in rows(document) if row.id.startswith(group)]


def test_the_document_and_the_tests_say_the_same() -> None:
    check(
        DOCUMENT.read_text("utf-8"),
        {file: tree(file) for file in python_files() if file.parts[0] == "tests"},
    )


def test_every_number_is_there_in_order() -> None:
    document = DOCUMENT.read_text("utf-8")
    for group in "BLSF":
        found = numbers(document, group)
        assert found == list(range(1, len(found) + 1)), group
    assert len(numbers(document, "B")) == 31 and len(numbers(document, "F")) == 23


GOOD = """
| id | what holds | how it is shown |
|---|---|---|
| B-01 | It holds. | `test_a.py` |
| B-02 | It will hold. | not built yet: a thing |
| B-03 | It holds there. | on a Mac: [on-a-mac.md](on-a-mac.md) |
"""
MARKED = '@pytest.mark.requirement("B-01")\ndef test_one(): ...'


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("`test_a.py`", "`test_b.py`"), "B-01: the row names"),
        (("`test_a.py`", "`test_a.py`, `test_b.py`"), "B-01: the row names"),
        (("`test_a.py`", "not built yet: a thing"), "B-01: the row names"),
        (("`test_a.py`", ON_A_MAC), "B-01: the row names"),
        (("not built yet: a thing", "`test_a.py`"), "B-02: the row names"),
        (("not built yet: a thing", "not built yet: "), "B-02: how it is shown"),
        (("not built yet: a thing", "somehow"), "B-02: how it is shown"),
        (("| B-02 |", "| B-01 |"), "two rows"),
        (("| B-01 | It", "| B-1 | It"), "not a row"),
        (("It holds. |", "|"), "not a row"),
        (("| B-01 | It holds. | `test_a.py` |\n", ""), "in no row"),
    ],
)
def test_a_document_that_says_something_else(change: tuple[str, str], why: str) -> None:
    assert GOOD.count(change[0]) == 1
    check(GOOD, {Path("tests/test_a.py"): ast.parse(MARKED)})
    with pytest.raises(AssertionError, match=why):
        check(GOOD.replace(*change), {Path("tests/test_a.py"): ast.parse(MARKED)})


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("", "B-01: the row names"),
        (MARKED.replace("B-01", "B-02"), "B-01: the row names"),
        (MARKED.replace("B-01", "B-04"), "in no row"),
        (MARKED.replace("B-01", "B1"), "no id"),
        (MARKED.replace('"B-01"', "NAME"), "no id"),
        (MARKED.replace('"B-01"', ""), "without an id"),
        (MARKED.replace("test_one", "one"), "no test"),
        (MARKED + '\npytestmark = pytest.mark.requirement("B-01")', "no test"),
        (MARKED + '\nCASES.append(pytest.mark.requirement("B-01"))', "of no test"),
    ],
)
def test_tests_that_carry_something_else(source: str, why: str) -> None:
    with pytest.raises(AssertionError, match=why):
        check(GOOD, {Path("tests/test_a.py"): ast.parse(source)})
