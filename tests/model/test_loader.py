"""Where models come from, and what of them is run: nothing."""

import json
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from agent_memory import builtin
from agent_memory.errors import ModelRefused
from agent_memory.model import loader
from tests.model import tiny

NAME = "somebody/some-model"
FIND = "import sys; from agent_memory.model import loader; print(loader.find(sys.argv[1]))"


def in_the_hubs_cache(home: Path) -> Path:
    """As a download leaves it."""
    repo = home / "hub" / f"models--{NAME.replace('/', '--')}"
    snapshot = repo / "snapshots" / ("0" * 40)
    shutil.copytree(builtin.PATH, snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    return snapshot


@pytest.mark.requirement("L-10")
@pytest.mark.parametrize("is_there", [True, False])
def test_what_is_in_the_hubs_cache_is_not_asked_of_the_hub(tmp_path: Path, is_there: bool) -> None:
    """A hub of our own that nobody answers for: whether it was asked shows."""
    with socket.create_server(("127.0.0.1", 0)) as hub:
        hub.settimeout(0.1 if is_there else 20)
        endpoint = f"http://127.0.0.1:{hub.getsockname()[1]}"
        environ = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": endpoint}
        snapshot = in_the_hubs_cache(tmp_path) if is_there else None
        with subprocess.Popen(
            [sys.executable, "-c", FIND, NAME], env=environ, stdout=subprocess.PIPE, text=True
        ) as child:
            if is_there:
                assert child.communicate(timeout=60)[0].strip() == str(snapshot)
                with pytest.raises(TimeoutError):
                    hub.accept()
            else:
                hub.accept()[0].close()
                child.kill()


@pytest.mark.requirement("L-10")
def test_a_folder_is_a_model_and_what_is_no_model_is_told(tmp_path: Path) -> None:
    assert loader.find(str(tmp_path)) == tmp_path
    assert loader.find("builtin") == builtin.PATH
    with pytest.raises(ModelRefused, match="no such folder"):
        loader.find(str(tmp_path / "nowhere"))


def add_to(file: Path, facts: dict[str, object]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | facts))


@pytest.mark.requirement("S-18")
@pytest.mark.parametrize(
    ("file", "facts"),
    [
        ("config.json", {"model_file": "own.py"}),
        ("config.json", {"auto_map": {"AutoModelForCausalLM": "own.Own", "AutoConfig": "own.Own"}}),
        (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"},
        ),
    ],
)
def test_no_code_of_a_model_is_run(tmp_path: Path, file: str, facts: dict[str, object]) -> None:
    """It is loaded without, or refused; in a thread, as the engine does it."""
    folder = shutil.copytree(builtin.PATH, tmp_path / "model")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w').close()")
    add_to(folder / file, facts)
    with ThreadPoolExecutor(1) as engine:
        load = engine.submit(loader.load_whole, str(folder), 8, 64)
        error = load.exception()
    assert not (tmp_path / "was-run").exists()
    assert error is None or isinstance(error, ModelRefused | ValueError)


LARGER: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
"""Some 90 MB, of which loading needs for a moment what it needs for the smallest model, too."""


@pytest.mark.requirement("L-15")
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_loading_takes_no_more_than_the_model(dtype: mx.Dtype, tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model", **LARGER)
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    turned = {name: array.astype(dtype) for name, array in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), turned, {"format": "mlx"})
    del weights, turned
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    loaded = loader.load_whole(str(folder), 8, 64)
    taken, most = mx.get_active_memory() - before, mx.get_peak_memory() - before
    assert loaded.model is not None and taken > 80e6
    assert most < 1.2 * taken


@pytest.mark.parametrize(
    ("told", "temperature"),
    [
        ({}, 1.0),
        ({"temperature": None}, 1.0),
        ({"temperature": 0}, 0.0),
        ({"temperature": 0.6}, 0.6),
    ],
)
def test_what_a_models_makers_recommend(
    tmp_path: Path, told: dict[str, object], temperature: float
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(told), "utf-8")
    assert loader.default_sampling(tmp_path).temperature == temperature
