"""Text to learn from that is on every machine: what CPython itself ships (PSF licence).

The language reference from pydoc and the docstrings of the standard library, as plain ASCII.  Which
text exactly depends on the Python that runs this.
"""

import ast
import re
import sysconfig
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from pydoc_data import topics

MIN_CHARS = 200
MIN_DOCSTRING_CHARS = 40
LEFT_OUT = re.compile(
    r"site-packages|tests?/|lib2to3|idlelib/|pydoc_data|encodings/|turtledemo|_pyrepl|config-"
)
_TIDY = (
    (re.compile(r"[ \t]+\n"), "\n"),
    (re.compile(r"\n{3,}"), "\n\n"),
    (re.compile(r"[-=*~^_#]{5,}"), "----"),
    (re.compile(r" {9,}"), " " * 8),
)


def documents() -> Iterator[str]:
    """Reference topics, then one document per module; none that begins as another does."""
    beginnings = set()
    for text in chain(topics.topics.values(), _modules()):
        document = _tidy(text)
        if len(document) >= MIN_CHARS and document[:400] not in beginnings:
            beginnings.add(document[:400])
            yield document


def _tidy(text: str) -> str:
    text = text.replace("\r", "").expandtabs(4).encode("ascii", "ignore").decode()
    for pattern, plain in _TIDY:
        text = pattern.sub(plain, text)
    return text.strip()


def _modules() -> Iterator[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(library.rglob("*.py")):
        if LEFT_OUT.search(str(file.relative_to(library))):
            continue
        yield "\n\n".join(_docstrings(ast.parse(file.read_bytes())))


def _docstrings(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if text and len(text) >= MIN_DOCSTRING_CHARS:
            yield f"{_title(node)}{text}"


def _title(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    if isinstance(node, ast.Module):
        return ""
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}:\n"
    return f"{node.name}({', '.join(arg.arg for arg in node.args.args)}):\n"
