"""Ten agents with one long system prompt: it is computed, stored and held once."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agent_memory.block import BLOCK_TOKENS
from agent_memory.request import Conversation
from tests.conftest import DEFAULT_KV_BITS, builtin_model, ordinary_text
from tests.e2e.conversations import Messages
from tests.process import Server

NUM_AGENTS = 10
SYSTEM_TOKENS = 1000
MAX_TOKENS = 60
REPEAT = "Repeat this:\n" + "0" * 60


def prompts() -> tuple[list[Messages], int]:
    """-> (what each agent asks, how many leading tokens all of it shares)."""
    tokenizer = builtin_model(None).tokenizer
    system = tokenizer.stream()
    text = "".join(map(system.add, tokenizer.encode(ordinary_text())[:SYSTEM_TOKENS]))
    asked = [
        [{"role": "system", "content": text}, {"role": "user", "content": f"{n} {REPEAT}"}]
        for n in range(NUM_AGENTS)
    ]
    tokens = [tokenizer.encode_chat(Conversation(messages)) for messages in asked]
    shared = next(i for i, column in enumerate(zip(*tokens, strict=False)) if len({*column}) > 1)
    return asked, shared


def ask(server: Server, agent: int, messages: Messages) -> dict[str, int]:
    body = {"messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS}
    usage = server.post(body, **{"X-Agent-ID": f"agent-{agent}"}).json()["usage"]
    return {
        "computed": usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"],
        "kept": usage["prompt_tokens"] + usage["completion_tokens"],
    }


@pytest.mark.parametrize("kv_bits", DEFAULT_KV_BITS)
def test_at_once_it_is_computed_once_stored_once_and_held_as_one_run(
    kv_bits: int | None, tmp_path: Path
) -> None:
    asked, shared = prompts()
    assert shared >= SYSTEM_TOKENS
    with Server(tmp_path, "--kv-bits", str(kv_bits or "none")).wait_ready() as server:
        with ThreadPoolExecutor(NUM_AGENTS) as threads:
            answers = [threads.submit(ask, server, n, messages) for n, messages in enumerate(asked)]
            server.wait_until(lambda: server.metric("running") == NUM_AGENTS)
            runs = server.metric("runs")
        usages = [answer.result() for answer in answers]
        computed = sorted(usage["computed"] for usage in usages)
        assert computed[-1] > shared  # one agent's
        assert sum(computed[:-1]) <= (NUM_AGENTS - 1) * (computed[-1] - shared + 2)
        assert runs == 1
        full = shared // BLOCK_TOKENS
        own = sum(-(-usage["kept"] // BLOCK_TOKENS) - full for usage in usages)
        for n in range(NUM_AGENTS):
            tokens = server.get(f"/v1/agents/agent-{n}").json()["tokens"]
            server.wait_on_disk(f"agent-{n}", tokens)
        assert full <= server.metric("blocks_written_total") <= full + own
        one_block = server.metric("disk_bytes") / server.metric("blocks_written_total")
        assert server.metric("pool_bytes") <= (full + own + 1) * one_block * 1.5
