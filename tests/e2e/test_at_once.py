"""Agents at once get what they get alone, and a turn that has ended is soon on disk."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cold import Answer, ColdOf
from tests.conftest import DEFAULT_KV_BITS, builtin_model, ordinary_text
from tests.e2e.conversations import Messages, judge
from tests.process import Server

NUM_AGENTS = 4
MAX_TOKENS = 40


def prompts() -> list[Messages]:
    """Of 300 to 1,500 tokens; one repeats for as long as it may, so that steps are shared."""
    text, names = ordinary_text(), ("orchid", "harbor", "cedar", "falcon")
    asked = [
        f"Remember these facts:\n- the code for {name} is {4000 + 7 * i}\n"
        f"Read this:\n{text[9000 * i : 9000 * i + 1200 * (i + 1)]}\nWhat is the code for {name}?"
        for i, name in enumerate(names)
    ]
    asked[0] = "Repeat this:\n" + "0" * 100
    return [[{"role": "user", "content": text}] for text in asked]


@pytest.mark.requirement("B-22")
@pytest.mark.parametrize("kv_bits", DEFAULT_KV_BITS)
def test_four_at_once_are_as_alone(kv_bits: int | None, tmp_path: Path, cold: ColdOf) -> None:
    flags = ("--kv-bits", str(kv_bits or "none"))
    alone = [cold(kv_bits).answer(said, max_tokens=MAX_TOKENS) for said in prompts()]
    with Server(tmp_path, *flags).wait_ready() as server, ThreadPoolExecutor(NUM_AGENTS) as pool:
        asked = [
            pool.submit(Answer.of, server, said, f"agent-{i}", max_tokens=MAX_TOKENS)
            for i, said in enumerate(prompts())
        ]
        at_once = [answer.result() for answer in asked]
    for said, one, other in zip(prompts(), alone, at_once, strict=True):
        if one.text != other.text:
            parting = judge(builtin_model(kv_bits), said, one.text, other.text)
            assert kv_bits and parting.is_tie, parting


@pytest.mark.requirement("L-39")
def test_a_turn_that_has_ended_is_on_disk_within_a_second(server: Server) -> None:
    Answer.of(server, prompts()[3], "writer", max_tokens=MAX_TOKENS)
    ended = time.monotonic()
    while True:
        agent = server.get("/v1/agents/writer")
        if agent.status_code == 200 and agent.json()["tiers"]["disk"] == agent.json()["tokens"]:
            break
        assert time.monotonic() < ended + 1.0, agent.text
        time.sleep(0.01)
