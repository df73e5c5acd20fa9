"""lm-eval asks for loglikelihoods: they are the model's own, cached or not.

Needs `lm_eval` on the PATH: `pip install "lm-eval[api]" transformers`, best apart from ours.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from agent_memory import builtin
from tests.conftest import builtin_model, ordinary_text
from tests.process import Server

LM_EVAL = shutil.which("lm_eval")
NUM_QUESTIONS = 12
CHOICES = [" the", " a list of values", " 42\n\nThen"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(LM_EVAL is None, reason='pip install "lm-eval[api]" transformers'),
]

TASK = """
task: continued
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: choices
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def make_task(folder: Path) -> None:
    text = ordinary_text()
    documents = [
        {"text": text[n * 3000 : n * 3000 + 400 + 70 * n].rstrip(), "choices": CHOICES}
        for n in range(NUM_QUESTIONS)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    (folder / "continued.yaml").write_text(TASK.format(data=data))


def run(server: Server, folder: Path, out: str) -> list[dict[str, Any]]:
    """What lm-eval writes of each question, in order."""
    model = {
        "model": "builtin",
        "base_url": f"{server.url}/v1/completions",
        "tokenizer": str(builtin.PATH),
        "num_concurrent": "2",
    }
    assert LM_EVAL is not None
    command = [LM_EVAL, "--model", "local-completions", "--tasks", "continued", "--batch_size", "3"]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in model.items())]
    command += ["--include_path", str(folder), "--log_samples", "--output_path", str(folder / out)]
    environ = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    environ |= {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (samples,) = (folder / out).rglob("samples_*.jsonl")
    lines = map(json.loads, samples.read_text().splitlines())
    return sorted(lines, key=lambda line: int(line["doc_id"]))


def plain(context: str, choice: str) -> tuple[float, bool]:
    """The choice's loglikelihood and whether it is what the model would say: mlx-lm's forward."""
    loaded = builtin_model(None)
    whole = loaded.tokenizer.encode(context + choice)
    first = len(loaded.tokenizer.encode(context))
    logits = loaded.model(mx.array([whole]))[0, first - 1 : -1].astype(mx.float32)
    own = mx.array(whole[first:])
    scores = mx.take_along_axis(logits, own[:, None], -1)[:, 0] - mx.logsumexp(logits, axis=-1)
    return float(scores.sum()), bool(mx.all(mx.argmax(logits, -1) == own))


def test_loglikelihoods_are_the_models_own(tmp_path: Path) -> None:
    make_task(tmp_path)
    with Server(tmp_path, "--kv-bits", "none") as server:
        server.wait_ready()
        cold, again = (run(server, tmp_path, out) for out in ("cold", "again"))
    assert len(cold) == NUM_QUESTIONS
    for first, second in zip(cold, again, strict=True):
        for n, choice in enumerate(CHOICES):
            score, greedy = first["filtered_resps"][n]
            want, likeliest = plain(first["doc"]["text"], choice)
            assert abs(float(score) - want) < 1e-3 and str(greedy) == str(likeliest)
            assert second["filtered_resps"][n] == first["filtered_resps"][n]
