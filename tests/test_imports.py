"""Who may import whom, and how long files and functions may be.  No exceptions, no waivers."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.source import package_files, python_files, text, tree

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# server → engine → {model → kvcache, store} → leaves, with cli on top, ops and bench beside.
MAY_IMPORT = {
    "leaf": {"leaf"},
    "kvcache": {"leaf", "kvcache"},
    "store": {"leaf", "store"},
    "model": {"leaf", "kvcache", "model"},
    "engine": {"leaf", "kvcache", "store", "model", "engine"},
    "server": {"leaf", "kvcache", "store", "model", "engine", "server"},
    "ops": {"leaf", "store", "ops"},
    "bench": {"leaf", "ops", "bench"},
    "cli": {"leaf", "store.state_dir", "ops", "cli"},
}

# Outside packages that only some may import, by the beginning of the path.
ONLY_IN = {
    "mlx": (
        "kvcache/",
        "model/",
        "engine/engine.py",
        "engine/drawing.py",
        "engine/step_loop.py",
        "bench/models.py",
        "bench/bare.py",
    ),
    "llguidance": ("model/grammar.py",),
    "mlx_lm": ("model/", "bench/models.py", "bench/bare.py"),
    "tokenizers": ("model/", "bench/models.py", "bench/texts.py"),
    "transformers": ("model/",),
    "starlette": ("server/",),
    "hypercorn": ("server/",),
    "asyncio": (
        "server/",
        "engine/agent_verbs.py",
        "engine/models.py",
        "engine/served.py",
        "engine/switching.py",
        "engine/engine.py",
        "engine/mailbox.py",
        "engine/transfer.py",
    ),
    "importlib": (
        "bench/machine.py",  # versions
        "bench/results.py",  # draws where that can be done
        "cli.py",  # loads a command's code when it runs
        "ops/backend.py",
        "ops/machine.py",
    ),
    "matplotlib": ("bench/plots.py",),  # need not be there
    "pickle": (),  # who unpickles a file runs it
    "marshal": (),
    "shelve": (),
}

WAIVER = re.compile(r"#\s*(noqa|type:\s*ignore|mypy:|ruff:|pyright:|pragma:|fmt:|isort:)")


def imports(file: Path) -> Iterator[str]:
    """The dotted names that a file imports, `from a import b` as a.b."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(dotted: str) -> str:
    """The row of MAY_IMPORT of one of our modules."""
    name = dotted.removeprefix("agent_memory.")
    if name.startswith("store.state_dir"):
        return "store.state_dir"
    first = name.split(".")[0]
    return "cli" if first == "__main__" else first if first in MAY_IMPORT else "leaf"


def functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("file", package_files(), ids=str)
def test_rooms_import_only_what_is_below_them(file: Path) -> None:
    here = room(".".join(file.with_suffix("").parts))
    allowed = MAY_IMPORT["store" if here == "store.state_dir" else here]
    for name in imports(file):
        if name.startswith("agent_memory."):
            there = room(name)
            assert there in allowed or there.split(".")[0] in allowed, f"{here} imports {name}"


@pytest.mark.requirement("L-19", "S-19")
@pytest.mark.parametrize("file", package_files(), ids=str)
def test_outside_packages_stay_where_they_belong(file: Path) -> None:
    here = str(file.relative_to("agent_memory"))
    for name in imports(file):
        for_these = ONLY_IN.get(name.split(".")[0])
        assert for_these is None or here.startswith(for_these), f"{here} imports {name}"


def test_no_import_inside_a_function() -> None:
    inside = [
        f"{file}:{node.lineno}"
        for file in python_files()
        for function in functions(file)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert not inside


def test_only_commands_and_plots_are_loaded_by_name() -> None:
    loads = re.compile(r"\b(import_module|__import__|run_module|run_path)\b")
    loading = {str(file) for file in package_files() if loads.search(text(file))}
    assert loading == {"agent_memory/cli.py", "agent_memory/bench/results.py"}


@pytest.mark.requirement("L-24")
def test_metals_memory_is_never_wired_down() -> None:
    """Nor is anything of mlx-lm used that does."""
    wires = re.compile(r"set_wired_limit|wired_limit\(|BatchGenerator|\bstream_generate\b")
    assert not [str(file) for file in package_files() if wires.search(text(file))]
    used = {name.rpartition(".") for file in package_files() for name in imports(file)}
    assert {name for module, _, name in used if module == "mlx_lm.generate"} == {
        "TextStateMachine",
        "make_text_state_machine",
    }
    assert not {module for module, _, _ in used if module.startswith("mlx_lm.server")}


@pytest.mark.requirement("L-21")
def test_the_clock_on_the_wall_is_only_shown_and_written_down() -> None:
    """It may jump.  What waits, or is told to come back, goes by the monotonic clock."""
    asks = re.compile(r"\btime\.time\(|datetime\.now|\.today\(")
    asking = {str(file) for file in package_files() if asks.search(text(file))}
    assert {file.removeprefix("agent_memory/") for file in asking} == {
        "bench/main.py",  # the date of results
        "ops/checks.py",  # when processes that are gone by now began and ended
        "ops/running_commands.py",
        "ops/terminal.py",  # how long ago, for people
        "server/batch_runner.py",  # when a batch expires, whatever restarts come between
        "server/batches.py",
        "server/chat.py",  # `created` in an answer
        "server/explain.py",
        "server/kept.py",
        "server/recorder.py",  # what the process before this one came to
        "server/response_answer.py",
        "server/response_store.py",  # which are older than they may become
        "store/block_files.py",  # which of the files set aside are old
        "store/block_store.py",  # when an agent was last used
        "store/limits.py",  # on which days the server ran
        "store/starts.py",  # starts of the last ten minutes, in other processes
        "store/unfinished.py",  # until when a turn that was cut short is said to have lasted
    }


def test_files_are_short() -> None:
    num_lines = {str(file): text(file).count("\n") for file in python_files()}
    assert not {file: n for file, n in num_lines.items() if n > MAX_FILE_LINES}


def test_functions_are_short() -> None:
    long = {
        f"{file}:{function.lineno} {function.name}": num_lines
        for file in python_files()
        for function in functions(file)
        if (num_lines := (function.end_lineno or 0) - function.lineno + 1) > MAX_FUNCTION_LINES
    }
    assert not long


def test_no_rule_is_waived() -> None:
    waived = [
        f"{file}:{token.start[0]} {token.string}"
        for file in python_files()
        if WAIVER.search(text(file))  # in a string perhaps, which is what takes long to tell
        for token in tokenize.generate_tokens(io.StringIO(text(file)).readline)
        if token.type == tokenize.COMMENT and WAIVER.search(token.string)
    ]
    assert not waived
