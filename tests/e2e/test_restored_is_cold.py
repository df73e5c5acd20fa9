"""What comes from memory equals what is computed cold, over HTTP, with real processes and signals.

Each conversation is held with a server that remembers; before its last turn the server goes on,
is stopped with SIGTERM and started again, or killed with SIGKILL and started again.  The same last
request then goes to a server that remembers nothing; in the long form to a fresh process on an
empty state directory.
"""

import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cold import Answer, ColdOf, Messages
from tests.conftest import KV_BITS, builtin_model
from tests.e2e.conversations import (
    Conversation,
    Divergence,
    conversations,
    judge,
    plain_answer,
)
from tests.process import Server
from tests.suites import Cases, NewSuite

ON_DISK_S = 1.0  # a turn that has ended is on disk within this
END_S = 20

ColdAnswer = Callable[[Messages], Answer]


class Suite:
    """One server that remembers, restarted on the way.  Use it in `with`."""

    def __init__(self, folder: Path, kv_bits: int | None) -> None:
        self.folder = folder
        self.flags = ("--kv-bits", str(kv_bits or "none"))
        self.remembering = self._start()

    def __enter__(self) -> "Suite":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.remembering.end()

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


def run(folder: Path, kv_bits: int | None, cases: Cases, cold: ColdAnswer) -> str:
    """Hold them all; -> a report.  Raises AssertionError if too many answers part."""
    with Suite(folder, kv_bits) as suite:
        tokens, parted = compare(suite, kv_bits, cases, cold)
    assert all(parting.is_tie for _, _, parting in parted), parted
    assert len(parted) <= (max(1, tokens // 1000) if kv_bits else 0), parted
    return f"kv {kv_bits or 'none'}: {cases.planned} conversations, {tokens} tokens, ties {parted}"


def compare(
    suite: Suite, kv_bits: int | None, cases: Cases, cold: ColdAnswer
) -> tuple[int, list[tuple[str, str, Divergence]]]:
    """-> (tokens compared, where answers part: the conversation, from what, and how)."""
    talks = conversations(cases.planned, cases.seed or 0)
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
                computed = cold(messages)
                tokens += computed.completion
                rivals = {"cold": computed.text}
                if kv_bits is None:
                    rivals["plain mlx-lm"] = plain_answer(builtin_model(None), messages, 24)
                for rival, text in rivals.items():
                    if text != restored.text:
                        parting = judge(builtin_model(kv_bits), messages, restored.text, text)
                        parted.append((talk.name, rival, parting))
    return tokens, parted


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
        report(capsys, run(tmp_path, kv_bits, cases, cold(kv_bits).answer))


@pytest.mark.requirement("B-13", "B-14", "B-16", "B-31", "L-39")
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kv_bits", KV_BITS)
def test_fifty(
    kv_bits: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str], suite: NewSuite
) -> None:
    def cold(messages: Messages) -> Answer:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        with Server(folder, "--kv-bits", str(kv_bits or "none")) as fresh:
            answer = Answer.of(fresh.wait_ready(), messages, "cold")
        assert answer.cached == 0
        return answer

    with suite(f"restored is cold, kv {kv_bits or 'none'}", 50, 2) as cases:
        report(capsys, run(tmp_path, kv_bits, cases, cold))
