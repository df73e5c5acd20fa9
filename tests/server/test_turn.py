"""One turn with a real engine, without HTTP around it."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from starlette.requests import Request
from starlette.types import Message

from agent_memory.engine.engine import Engine
from agent_memory.model.grammar import Grammars
from agent_memory.request import Priority
from agent_memory.server import completions
from agent_memory.server.ask import Ask
from agent_memory.server.explain import Explanations
from agent_memory.server.quotas import Quotas
from agent_memory.server.turn import Turn
from tests.engine.test_engine import running


@pytest.fixture
def built_on(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """Threads that built what knows the bytes of tokens."""
    build, threads = Grammars._build, list[threading.Thread]()

    def noted(grammars: Grammars) -> object:
        threads.append(threading.current_thread())
        return build(grammars)

    monkeypatch.setattr(Grammars, "_build", noted)
    return threads


def request_to(engine: Engine) -> Request:
    state = {
        "engine": engine,
        "explanations": Explanations(),
        "quotas": Quotas(),
        "request_id": "r",
        "caller": SimpleNamespace(tenant=None),
    }
    return Request({"type": "http", "state": state})


async def test_what_logprobs_need_of_the_tokenizer_is_not_built_on_the_event_loop(
    tmp_path: Path, built_on: list[threading.Thread]
) -> None:
    """It takes a second or two, and every stream would wait for it."""
    async with running(tmp_path) as engine:
        ask = Ask(None, "ann", Priority.INTERACTIVE, "Hello", max_tokens=3, logprobs=1)
        turn = Turn(request_to(engine), ask, "t-")
        said = [piece async for piece in turn.said()]
        assert said and turn.bytes_of(5)
    assert built_on and threading.current_thread() not in built_on


async def test_nor_is_what_the_echo_of_a_prompt_of_tokens_needs(
    tmp_path: Path, built_on: list[threading.Thread]
) -> None:
    asked = completions.parse({"prompt": [72, 105], "echo": True, "max_tokens": 2}, {})
    sent = list[Message]()

    async def send(message: Message) -> None:
        sent.append(message)

    async with running(tmp_path) as engine:
        turns = [Turn(request_to(engine), ask, "cmpl-") for ask in asked.asks]
        await completions.Whole(turns, asked)({"type": "http"}, disconnected, send)
    assert sent[0]["status"] == 200
    assert built_on and threading.current_thread() not in built_on


async def disconnected() -> Message:
    return {"type": "http.disconnect"}
