"""A model with recurrent layers, over HTTP: after SIGTERM and after SIGKILL it goes on from its
last checkpoint, and says what it says cold."""

import signal
import time
from pathlib import Path

import pytest

from tests.cold import Answer
from tests.e2e.test_restored_is_cold import END_S, ON_DISK_S
from tests.model import tiny
from tests.process import Server


@pytest.mark.requirement("B-13")
@pytest.mark.parametrize("kv_bits", ["none", pytest.param("8", marks=pytest.mark.slow)])
def test_a_recurrent_model_after_a_stop_and_after_a_crash(tmp_path: Path, kv_bits: str) -> None:
    model = tiny.save("qwen3_5", tmp_path / "model")
    flags = ("--model", str(model), "--kv-bits", kv_bits)
    talk = [{"role": "user", "content": "Read this: " + "one two three " * 120}]
    for name in ("remembers", "cold"):
        (tmp_path / name).mkdir()
    before = 0
    for way in (signal.SIGTERM, signal.SIGKILL):
        with Server(tmp_path / "remembers", *flags).wait_ready() as server:
            answer = Answer.of(server, talk, "ann")
            assert answer.cached >= before and (answer.cached > 0) == (before > 0)
            before = answer.prompt - 8  # all but what makes the model answer
            reply = {"role": "assistant", "content": "It was so."}
            talk = [*talk, reply, {"role": "user", "content": "Say more."}]
            if way is signal.SIGKILL:
                time.sleep(ON_DISK_S)
            server.signal(way)
            server.wait(END_S)
    with Server(tmp_path / "remembers", *flags).wait_ready() as server:
        restored = Answer.of(server, talk, "ann")
        assert restored.cached >= before
    with Server(tmp_path / "cold", *flags).wait_ready() as server:
        cold = Answer.of(server, talk, "ann")
    assert cold.cached == 0 and cold.text == restored.text
