"""Which models a start configures, and under which names."""

from pathlib import Path

import pytest

from agent_memory.config import load
from agent_memory.errors import ConfigError
from agent_memory.model_source import ModelSource, parse


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def written(home: Path, text: str) -> Path:
    (home / "c.toml").write_text(text)
    return home / "c.toml"


@pytest.mark.parametrize(
    ("text", "name", "source"),
    [
        ("builtin", "builtin", "builtin"),
        ("mlx-community/Qwen3-4B", "mlx-community/Qwen3-4B", "mlx-community/Qwen3-4B"),
        ("/x/llama", "llama", "/x/llama"),
        ("/x/llama/", "llama", "/x/llama/"),
        ("~/llama", "llama", "~/llama"),
        ("./llama-8b", "llama-8b", "./llama-8b"),
        ("small=builtin", "small", "builtin"),
        ("org/small=/x/y=z", "org/small", "/x/y=z"),
        ("/x/y=z", "y=z", "/x/y=z"),
    ],
)
def test_a_name_is_given_or_found(text: str, name: str, source: str) -> None:
    assert parse(text) == ModelSource(name, source)


def test_a_folder_that_is_there_needs_no_mark(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(home)
    assert parse("models/llama") == ModelSource("llama", "models/llama")


@pytest.mark.parametrize("text", ["", " ", "a=", "a\nb", "/", "~nobody-of-this-name/x"])
def test_what_is_no_source(text: str) -> None:
    with pytest.raises(ValueError):
        parse(text)


def test_the_table_of_the_file_with_pins_and_contexts(home: Path) -> None:
    file = written(
        home,
        'context_length = 999\n[models]\nmain = "builtin"\n'
        '"org/big" = {source = "/x/big", pin = true, context_length = 4096}\n',
    )
    loaded = load({}, {}, file)
    assert loaded.model_chosen
    assert loaded.models == (
        ModelSource("main", "builtin", False, 999),
        ModelSource("org/big", "/x/big", True, 4096),
    )


def test_flag_over_variable_over_table(home: Path) -> None:
    file = written(home, '[models]\nmain = "builtin"')
    flags = {"model": [ModelSource("a", "/a"), ModelSource("b", "/b")], "context_length": 64}
    environ = {"AGENT_MEMORY_MODEL": "other=builtin", "AGENT_MEMORY_CONTEXT_LENGTH": "32"}
    assert [m.name for m in load(flags, environ, file).models] == ["a", "b"]
    assert load(flags, environ, file).models[0].context_length == 64
    assert load({}, environ, file).models == (ModelSource("other", "builtin", False, 32),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model = 'builtin'\n[models]\na = 'builtin'", "in the place of the key 'model'. Keep one"),
        ("models = 3", "in the place of the key 'model'"),
        ("[models]", "in the place of the key 'model'"),
        ("[models]\na = 3", "key 'a': 3 cannot be used. Allowed: a source, or a table"),
        ("[models]\na = {pin = true}", "Allowed: a source, or a table with 'source'"),
        ("[models]\na = {source = 'x', pin = 1}", "'pin' true or false"),
        ("[models]\na = {source = 'x', pins = true}", "'pin' true or false"),
        ("[models]\na = {source = 'x', context_length = 1}", "a context_length of 2 to"),
        ("[models]\n' a' = 'x'", "a name of letters"),
        ("[models]\na = ' '", "a source: builtin, a directory"),
    ],
)
def test_a_table_that_cannot_be_is_placed(home: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load({}, {}, written(home, text))
    assert str(caught.value).startswith(f"{home / 'c.toml'}, [models]")
    assert said in str(caught.value)


def test_two_of_one_name_are_refused() -> None:
    flags = {"model": [ModelSource("a", "/x/a"), ModelSource("a", "/y/a")]}
    with pytest.raises(ConfigError, match="^--model: two models would be called 'a'. Name one"):
        load(flags, {}, None)
