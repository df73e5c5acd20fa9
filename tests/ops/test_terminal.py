"""Tables for people, and for whoever reads them out of a pipe."""

import pytest

from agent_memory.ops.terminal import Terminal

NAME = "an-agent-with-a-long-name-" * 3


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    Terminal().table(["agent", *(f">column {n}" for n in range(8))], [[NAME, *["12,345"] * 8]])
    return capsys.readouterr().out


def test_in_a_pipe_no_name_is_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert NAME in shown(capsys)


def test_as_wide_as_was_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    text = shown(capsys)
    assert NAME not in text and max(map(len, text.splitlines())) <= 120
