"""OpenAI's own client on the Responses API of a real server, and what an agent like Codex does."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent_memory import builtin
from tests.conftest import ordinary_text
from tests.process import Server

HOW = "needs the group of clients: pip install --group clients"
openai = pytest.importorskip("openai", reason=HOW)
pydantic = pytest.importorskip("pydantic", reason=HOW)
types = pytest.importorskip("openai.types.responses", reason=HOW)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LONG = "Read this:\n" + ordinary_text()[:2500]
CITIES = {
    "type": "object",
    "properties": {"city": {"enum": ["Lisbon", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "name": "get_weather", "parameters": CITIES, "strict": True}
BEGIN_THOUGHT, END_THOUGHT = "ĠHow", "Ġhelp"
"""Tokens of "Hello! How can I help you?"."""


def client_of(server: Server, **more: Any) -> Any:
    return openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300, **more
    )


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with Server(tmp_path_factory.mktemp("server")) as server:
        yield client_of(server.wait_ready())


def asking(said: object, **fields: object) -> dict[str, Any]:
    asked = {"model": "builtin", "input": said, "temperature": 0, "max_output_tokens": 40}
    return {**asked, **fields}


def cached(response: Any) -> int:
    return int(response.usage.input_tokens_details.cached_tokens)


def test_a_response_whole_and_streamed(client: Any) -> None:
    whole = client.responses.create(**asking("Hello there"))
    assert whole.status == "completed" and whole.output_text and whole._request_id
    with client.responses.stream(**asking("Hello there")) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == final.output_text == whole.output_text
    assert cached(final) > cached(whole)


def test_every_event_and_answer_is_as_the_types_have_them(client: Any) -> None:
    event_type = pydantic.TypeAdapter(types.ResponseStreamEvent)
    for more in (
        {"include": ["message.output_text.logprobs"], "top_logprobs": 1},
        {"tools": [WEATHER], "tool_choice": "required"},
        {"max_output_tokens": 2, "store": False, "instructions": "Be brief."},
    ):
        with client.responses.with_streaming_response.create(
            **asking("Hello", stream=True, **more)
        ) as answer:
            lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
        for line in lines:
            event_type.validate_json(line.removeprefix("data: "))
        raw = client.responses.with_raw_response.create(**asking("Hello", **more))
        response = types.Response.model_validate_json(raw.http_response.text)
        assert response.id and len(lines) > 5


def test_tools_are_called_and_answered(client: Any) -> None:
    asked = asking(
        "Weather?",
        tools=[WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=100,
    )
    with client.responses.stream(**asked) as stream:
        for event in stream:
            if event.type == "response.function_call_arguments.delta":
                assert event.snapshot
        response = stream.get_final_response()
    [call] = response.output
    assert call.name == "get_weather" and call.parsed_arguments["city"] in ("Lisbon", "Oslo")
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    after = client.responses.create(
        **asking([output], tools=[WEATHER], previous_response_id=response.id)
    )
    assert cached(after) >= response.usage.input_tokens


def test_an_answer_is_parsed(client: Any) -> None:
    city = pydantic.create_model("City", city=(str, ...), __config__={"extra": "forbid"})
    response = client.responses.parse(**asking("Where?", text_format=city))
    assert isinstance(response.output_parsed, city)


def test_what_is_kept_is_had_and_deleted(client: Any) -> None:
    first = client.responses.create(**asking("Hello there", metadata={"topic": "none"}))
    assert client.responses.retrieve(first.id) == first
    second = client.responses.create(**asking("And?", previous_response_id=first.id))
    items = [item.id for item in client.responses.input_items.list(second.id, limit=2)]
    assert len(items) == 3 and items[1] == first.output[0].id
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    assert client.responses.retrieve(second.id).previous_response_id == first.id


def test_errors_have_their_types(client: Any) -> None:
    for status, param, code, fields in (
        (400, "temperature", "invalid_value", {"temperature": 9}),
        (400, "background", "unsupported_parameter", {"background": True}),
        (400, "input", "context_length_exceeded", {"input": ordinary_text()[:60_000]}),
        (404, None, "model_not_found", {"model": "gpt-9"}),
        (404, "previous_response_id", "previous_response_not_found", {"previous_response_id": "x"}),
    ):
        with pytest.raises(openai.APIStatusError) as caught:
            client.responses.create(**asking("Hello", **fields))
        error = caught.value
        assert (error.status_code, error.code) == (status, code)
        assert error.param == param or param is None
        assert isinstance(error, openai.BadRequestError if status == 400 else openai.NotFoundError)
    kept = client.responses.create(**asking("Hello")).id
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(kept)


def test_a_conversation_goes_on_after_a_restart(tmp_path: Path) -> None:
    more = {"default_headers": {"X-Agent-ID": "ann"}}
    with Server(tmp_path) as server:
        client = client_of(server.wait_ready(), **more)
        first = client.responses.create(**asking(LONG, max_output_tokens=8))
    with Server(tmp_path) as server:
        client = client_of(server.wait_ready(), **more)
        asked = asking("And then?", previous_response_id=first.id)
        again = client.responses.create(**asked)
        assert first.usage.total_tokens - 2 <= cached(again) <= first.usage.total_tokens
        alone = client.responses.create(**asking("Something else"))
        assert cached(alone) < 10
        assert client.responses.create(**asked).output_text == again.output_text


def model_with(folder: Path, change: dict[str, Any]) -> Path:
    """The built-in model with other settings."""
    shutil.copytree(
        Path(builtin.PATH), folder, ignore=shutil.ignore_patterns("*.py", "__pycache__")
    )
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **change}), "utf-8")
    return folder


def thinker(folder: Path) -> Path:
    """The built-in model, which begins every answer with a thought: two of its tokens are marks."""
    model_with(folder, {})
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
    config["chat_template"] = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.reasoning_content %}Hello!<think> {{ m.reasoning_content }}</think> {% endif %}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\nHello!<think>' }}{% endif %}"
    )
    path.write_text(json.dumps(config), "utf-8")
    return folder


def test_thoughts_come_back_and_are_remembered(tmp_path: Path) -> None:
    model = thinker(tmp_path / "thinker")
    with Server(tmp_path, "--model", str(model)) as server:
        client = client_of(server.wait_ready())
        name = client.models.list().data[0].id
        include = ["reasoning.encrypted_content"]
        asked = asking("Hello there", model=name, store=False, include=include)
        with client.responses.stream(**asked) as stream:
            for event in stream:
                if event.type == "response.reasoning_text.done":
                    assert event.text == "can I"
            first = stream.get_final_response()
        thought, words = first.output
        assert thought.content[0].text == "can I" and words.content[0].text == "you?"
        assert 0 < first.usage.output_tokens_details.reasoning_tokens < first.usage.output_tokens
        back = thought.to_dict() | {"content": []}  # as Codex has it: what is sealed is enough
        said = [{"role": "user", "content": "Hello there"}, back, words.to_dict()]
        again = client.responses.create(
            **asking([*said, {"role": "user", "content": "And?"}], model=name, store=False)
        )
        total = first.usage.total_tokens
        assert total - 2 <= cached(again) <= total


def agents_request(instructions: str, items: list[dict[str, Any]]) -> dict[str, Any]:
    """As Codex sends it: its own instructions are a developer's message."""
    function = {"type": "function", "strict": False, "parameters": CITIES}
    names = ("exec_command", "write_stdin", "update_plan", "view_image")
    team = [{**function, "name": name, "description": "…"} for name in ("spawn", "wait", "close")]
    tools = [
        *({**function, "name": name, "description": instructions[:900]} for name in names),
        {"type": "namespace", "name": "multi_agent_v1", "description": "…", "tools": team},
        {"type": "web_search", "external_web_access": True},
    ]
    first = [part("developer", instructions), part("developer", "<skills>none</skills>")]
    about = part("user", "<environment_context>\n  <cwd>/work</cwd>\n</environment_context>")
    return {
        "model": "builtin",
        "input": [*first, about, *items],
        "tools": tools,
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"summary": "auto"},
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0199a213-81c0-7800-8aa1-bbab2a035a53",
        "extra_body": {"client_metadata": {"x-codex-installation-id": "1"}},
    }


def part(role: str, text: str) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": [{"type": "input_text", "text": text}]}


def test_an_agent_like_codex_computes_only_what_is_new(tmp_path: Path) -> None:
    model = model_with(tmp_path / "model", {"max_position_embeddings": 32768})
    instructions = re.sub(r"\s+", " ", ordinary_text())[:35_000]
    with Server(tmp_path, "--model", str(model)) as server:
        client = client_of(server.wait_ready(), default_headers={"session-id": "codex-1"})
        name = client.models.list().data[0].id

        def send(*items: dict[str, Any], **more: Any) -> Any:
            asked = {**agents_request(instructions, list(items)), "model": name, **more}
            asked |= {"temperature": 0, "max_output_tokens": 100}
            assert len(json.dumps(asked)) > 39_000
            with client.responses.stream(**asked) as stream:
                *_, last = stream
            return last.response

        forced = {"type": "function", "name": "exec_command"}
        first = send(part("user", "What is the weather?"), tool_choice=forced)
        [call] = first.output
        assert call.type == "function_call" and cached(first) < 10
        output = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
        items = [part("user", "What is the weather?"), *(i.to_dict() for i in first.output), output]
        second = send(*items)
        total = first.usage.total_tokens
        assert total - 4 <= cached(second) <= total < second.usage.input_tokens
        assert server.events("request_done")[-1]["agent"] == "codex-1"
