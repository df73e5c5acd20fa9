"""What comes from memory equals what is computed cold, over HTTP, with real processes and signals.

Each conversation is held with a server that remembers; before its last turn the server goes on,
is stopped with SIGTERM and started again, or killed with SIGKILL and started again.  The same last
request then goes to a server that remembers nothing.
"""

import signal
import sys
import time
from pathlib import Path

import pytest

from tests.cold import Answer, ColdOf
from tests.conftest import KV_BITS, builtin_model
from tests.e2e.conversations import (
    Conversation,
    conversations,
    judge,
    plain_answer,
)
from tests.process import Server
from tests.suites import Cases, NewSuite

ON_DISK_S = 1.0  # a turn that has ended is on disk within this
END_S = 20


class Suite:
    """One server that remembers, restarted on the way."""

    def __init__(self, folder: Path, kv_bits: int | None) -> None:
        self.folder = folder
        self.flags = ("--kv-bits", str(kv_bits or "none"))
        self.remembering = self._start()

    def _start(self) -> Server:
        return Server(self.folder, *self.flags).wait_ready()

    def hold(self, talk: Conversation) -> Answer:
        """All turns but the last; -> the last answer's figures."""
        answer = None
        for text in talk.turns[:-1]:
            answer = Answer.of(self.remembering, talk.said(text), talk.name)
            talk.heard(text, answer.text)
        assert answer is not None
        return answer

    def restart(self, way: str) -> None:
        if way == "kill":
            time.sleep(ON_DISK_S)
        if way != "memory":
            self.remembering.signal(signal.SIGKILL if way == "kill" else signal.SIGTERM)
            code = self.remembering.wait(END_S)
            assert code == (-signal.SIGKILL if way == "kill" else 0)
            self.remembering = self._start()


def run(folder: Path, kv_bits: int | None, cases: Cases, cold_of: ColdOf) -> str:
    """Hold them all; -> a report.  Raises AssertionError if too many answers part."""
    count, seed = cases.planned, cases.seed or 0
    suite, forgetful = Suite(folder, kv_bits), cold_of(kv_bits)
    talks = conversations(count, seed)
    before = {talk.name: suite.hold(talk) for talk in talks}
    tokens, parted = 0, []
    for way in dict.fromkeys(talk.way for talk in talks):
        suite.restart(way)
        for talk in [talk for talk in talks if talk.way == way]:
            with cases.case(talk.name):
                messages = talk.last_request()
                restored = Answer.of(suite.remembering, messages, talk.name)
                assert restored.cached > 0, talk.name
                if not talk.diverges:
                    assert restored.cached >= before[talk.name].prompt, talk.name
                cold = forgetful.answer(messages)
                tokens += cold.completion
                rivals = {"cold": cold.text}
                if kv_bits is None:
                    rivals["plain mlx-lm"] = plain_answer(builtin_model(None), messages, 24)
                for rival, text in rivals.items():
                    if text != restored.text:
                        parting = judge(builtin_model(kv_bits), messages, restored.text, text)
                        parted.append((talk.name, rival, parting))
    suite.remembering.end()
    assert all(parting.is_tie for _, _, parting in parted), parted
    assert len(parted) <= (max(1, tokens // 1000) if kv_bits else 0), parted
    return f"kv {kv_bits or 'none'}: {count} conversations, {tokens} tokens, ties {parted}"


def report(capsys: pytest.CaptureFixture[str], text: str) -> None:
    with capsys.disabled():
        sys.stdout.write(f"\n{text}\n")


@pytest.mark.requirement("B-13", "B-14", "B-16", "B-31", "L-39")
@pytest.mark.timeout(240)
@pytest.mark.parametrize("kv_bits", KV_BITS)
def test_a_few(
    kv_bits: int | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    suite: NewSuite,
    cold: ColdOf,
) -> None:
    with suite(f"restored is cold, kv {kv_bits or 'none'}", 6, 1) as cases:
        report(capsys, run(tmp_path, kv_bits, cases, cold))


@pytest.mark.requirement("B-13", "B-14", "B-16", "B-31", "L-39")
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kv_bits", KV_BITS)
def test_fifty(
    kv_bits: int | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    suite: NewSuite,
    cold: ColdOf,
) -> None:
    with suite(f"restored is cold, kv {kv_bits or 'none'}", 50, 2) as cases:
        report(capsys, run(tmp_path, kv_bits, cases, cold))
