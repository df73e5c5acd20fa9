"""One turn with a real engine, without HTTP around it."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from starlette.requests import Request

from agent_memory.model.grammar import Grammars
from agent_memory.request import Priority
from agent_memory.server.ask import Ask
from agent_memory.server.explain import Explanations
from agent_memory.server.quotas import Quotas
from agent_memory.server.turn import Turn
from tests.engine.test_engine import running


async def test_what_logprobs_need_of_the_tokenizer_is_not_built_on_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes a second or two, and every stream would wait for it."""
    build, built_on = Grammars._build, list[threading.Thread]()

    def noted(grammars: Grammars) -> object:
        built_on.append(threading.current_thread())
        return build(grammars)

    monkeypatch.setattr(Grammars, "_build", noted)
    async with running(tmp_path) as engine:
        state = {
            "engine": engine,
            "explanations": Explanations(),
            "quotas": Quotas(),
            "request_id": "r",
            "caller": SimpleNamespace(tenant=None),
        }
        request = Request({"type": "http", "state": state})
        ask = Ask(None, "ann", Priority.INTERACTIVE, "Hello", max_tokens=3, logprobs=1)
        turn = Turn(request, ask, "t-")
        said = [piece async for piece in turn.said()]
        assert said and turn.bytes_of(5)
    assert built_on and threading.current_thread() not in built_on
