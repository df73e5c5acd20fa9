"""Anthropic's own client against a real server: what it understands of our answers."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent_memory import builtin
from tests.process import ENDLESS, Server

HOW = "needs the group of clients: pip install --group clients"
anthropic = pytest.importorskip("anthropic", reason=HOW)
pydantic = pytest.importorskip("pydantic", reason=HOW)
pytestmark = pytest.mark.slow

WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Lisbon", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
BEGIN_THOUGHT, END_THOUGHT = "ĠHow", "Ġhelp"
"""Tokens of "Hello! How can I help you?"."""


def client_of(server: Server) -> Any:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with Server(tmp_path_factory.mktemp("server")) as server:
        yield client_of(server.wait_ready())


def asking(text: str, **fields: object) -> dict[str, Any]:
    """At temperature 0, which the client has no name for any more."""
    messages = [{"role": "user", "content": text}]
    asked = {"model": "builtin", "max_tokens": 60, "messages": messages}
    return {**asked, "extra_body": {"temperature": 0}, **fields}


def test_a_message_whole_and_streamed(client: Any) -> None:
    whole = client.messages.create(**asking("Hello there"))
    assert whole.type == "message" and whole._request_id.startswith("req-")
    assert (whole.stop_reason, whole.stop_sequence) == ("end_turn", None)
    [block] = whole.content
    with client.messages.stream(**asking("Hello there")) as stream:
        assert "".join(stream.text_stream) == block.text
        final = stream.get_final_message()
    assert final.content[0].text == block.text
    assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", whole.usage.output_tokens)
    assert final.usage.cache_read_input_tokens > whole.usage.cache_read_input_tokens
    kinds = [event.type for event in client.messages.create(**asking("Hello there"), stream=True)]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}


def test_the_count_is_the_later_usage(client: Any) -> None:
    asked = asking("Count this.", system="Be short.")
    names = ("model", "messages", "system")
    count = client.messages.count_tokens(**{name: asked[name] for name in names})
    for _ in range(2):
        used = client.messages.create(**asked).usage
        read, created = used.cache_read_input_tokens, used.cache_creation_input_tokens
        assert count.input_tokens == used.input_tokens + read + created
    assert used.input_tokens == 1


def test_why_it_ended(client: Any) -> None:
    cut = client.messages.create(**asking(ENDLESS, max_tokens=5))
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 5)
    stopped = client.messages.create(**asking(ENDLESS, stop_sequences=["000"]))
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "000")


def test_a_tool_loop(client: Any) -> None:
    tool = {"type": "tool", "name": "get_weather"}
    asked = asking("The weather in Oslo?", tools=[WEATHER])
    with client.messages.stream(**{**asked, "max_tokens": 120}, tool_choice=tool) as stream:
        called = stream.get_final_message()
    [use] = called.content
    assert (called.stop_reason, use.name) == ("tool_use", "get_weather")
    assert use.input["city"] in ("Lisbon", "Oslo")
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "Sunny."}
    asked["messages"] += [
        {"role": "assistant", "content": called.content},
        {"role": "user", "content": [result]},
    ]
    after = client.messages.create(**asked)
    assert after.content and after.usage.cache_read_input_tokens > called.usage.input_tokens


def test_parsed_output(client: Any) -> None:
    form = pydantic.create_model("Form", yes=(bool, ...))
    answer = client.messages.parse(**asking("Yes or no?"), output_format=form)
    assert isinstance(answer.parsed_output, form)


async def test_the_asynchronous_and_the_beta_client(client: Any) -> None:
    url = str(client.base_url)
    async with anthropic.AsyncAnthropic(base_url=url, api_key="none") as asynchronous:
        answer = await asynchronous.beta.messages.create(
            **asking("Hello there"),
            betas=["context-management-2025-06-27"],
            context_management={"edits": [{"type": "clear_tool_uses_20250919"}]},
        )
    assert answer.content[0].text


def test_errors_are_those_of_their_status(client: Any) -> None:
    create = client.messages.create
    with pytest.raises(anthropic.NotFoundError, match="builtin") as caught:
        create(**asking("Hi", model="claude-opus-9"))
    assert caught.value.body["error"]["type"] == "not_found_error"
    assert caught.value.request_id == caught.value.body["request_id"]
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        create(**asking("Hi", extra_body={"temperature": 2}))
    with pytest.raises(anthropic.BadRequestError, match="8192"):
        list(create(**asking("word " * 9000), stream=True))
    with pytest.raises(anthropic.BadRequestError, match="web_search"):
        create(**asking("Hi"), tools=[{"type": "web_search_20250305", "name": "web_search"}])
    with pytest.raises(anthropic.PermissionDeniedError):
        create(**asking("Hi"), extra_headers={"Origin": "http://evil.example"})
    with pytest.raises(anthropic.APIStatusError) as caught:
        create(**asking("x" * (9 << 20)))
    assert caught.value.body["error"]["type"] == "request_too_large"


def test_a_stream_that_fails_raises(tmp_path: Path) -> None:
    with Server(tmp_path, "--drain-timeout", "0.2").wait_ready() as server:
        asked = asking(ENDLESS, max_tokens=8000)
        with (
            client_of(server).messages.create(**asked, stream=True) as stream,
            pytest.raises(anthropic.APIStatusError) as caught,
        ):
            for event in stream:
                if event.type == "content_block_delta":
                    server.signal()
    assert caught.value.body["error"]["type"] == "overloaded_error"


# ── thoughts ─────────────────────────────────────────────────────────────────────────────────


def thinker(folder: Path) -> Path:
    """The built-in model, in whose greeting two words are the marks of a thought instead, and whose
    template says when it must not think."""
    shutil.copytree(builtin.PATH, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    path = folder / "tokenizer.json"
    made = json.loads(path.read_text("utf-8"))
    vocab, merges = made["model"]["vocab"], made["model"]["merges"]
    for token, mark in ((BEGIN_THOUGHT, "<think>"), (END_THOUGHT, "</think>")):
        vocab[mark] = vocab.pop(token)
        merges[:] = [pair for pair in merges if token not in (*pair, "".join(pair))]
        added = {**made["added_tokens"][0], "id": vocab[mark], "content": mark, "special": False}
        made["added_tokens"].append(added)
    path.write_text(json.dumps(made), "utf-8")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    config["chat_template"] += "{% if enable_thinking is false %}<think></think>{% endif %}"
    path.write_text(json.dumps(config), "utf-8")
    return folder


def test_thoughts(tmp_path: Path) -> None:
    model = thinker(tmp_path / "thinker")
    with Server(tmp_path, "--model", str(model)).wait_ready() as server:
        client = client_of(server)
        name = server.get("/v1/models").json()["data"][0]["id"]
        asked = asking("Hello there", model=name, thinking={"type": "adaptive"})
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            streamed = stream.get_final_message()
        for answer in (whole, streamed):
            before, thought, after = answer.content
            assert (before.text, thought.thinking, after.text) == ("Hello!", "can I", "you?")
            assert thought.signature
        asked["messages"] += [
            {"role": "assistant", "content": whole.content},
            {"role": "user", "content": "Bye"},
        ]
        assert client.messages.create(**asked).content
        names = ("model", "messages")
        again = {name: asked[name] for name in names}
        free = client.messages.count_tokens(**again, thinking={"type": "adaptive"})
        held = client.messages.count_tokens(**again, thinking={"type": "disabled"})
        assert held.input_tokens == free.input_tokens + 2
