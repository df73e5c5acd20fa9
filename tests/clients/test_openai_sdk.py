"""OpenAI's own client on a real server: models, chats, completions, files, batches, errors."""

import json
import time
from typing import Any

import pytest

from tests.process import Server, chat

HOW = "needs the group of clients: pip install --group clients"
openai = pytest.importorskip("openai", reason=HOW)
pydantic = pytest.importorskip("pydantic", reason=HOW)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

HELLO: list[dict[str, str]] = [{"role": "user", "content": "Hello there"}]
ADD = {
    "name": "add",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}, "b": {"enum": [3, 4]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}
TOOLS = [{"type": "function", "function": ADD}]


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)


def ask(client: Any, messages: Any = None, **fields: Any) -> Any:
    given = {"model": "builtin", "temperature": 0, "max_tokens": 40, **fields}
    return client.chat.completions.create(messages=messages or HELLO, **given)


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["builtin"]
    assert client.models.retrieve("builtin").owned_by == "agent-memory"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/other")


def test_a_chat_and_its_second_turn(client: Any) -> None:
    first = ask(client, user="sdk-chat")
    said = first.choices[0].message
    assert said.content and first.choices[0].finish_reason == "stop"
    longer = [*HELLO, said.model_dump(), {"role": "user", "content": "And now?"}]
    second = ask(client, longer, user="sdk-chat")
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens


def test_chunks_and_the_stream_helper(client: Any) -> None:
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(deltas) == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    with client.chat.completions.stream(model="builtin", messages=HELLO, temperature=0) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "content.delta" in events and events[-1] == "content.done"
    assert final.choices[0].message.content == whole.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_tool(client: Any, stream: bool) -> None:
    choice = {"type": "function", "function": {"name": "add"}}
    asked = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 200}
    if stream:
        with client.chat.completions.stream(
            model="builtin", messages=HELLO, temperature=0, **asked
        ) as events:
            answer = events.get_final_completion()
    else:
        answer = ask(client, **asked)
    (call,) = answer.choices[0].message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "add" and arguments["a"] in (1, 2) and arguments["b"] in (3, 4)
    result = {"role": "tool", "tool_call_id": call.id, "content": "5"}
    message = answer.choices[0].message.model_dump(exclude_none=True)
    message.pop("parsed", None)
    for one in message["tool_calls"]:
        one["function"].pop("parsed_arguments", None)
    assert ask(client, [*HELLO, message, result], tools=TOOLS).choices


def test_a_parsed_answer(client: Any) -> None:
    city = pydantic.create_model("City", name=(str, ...), large=(bool, ...))
    parsed = client.chat.completions.parse(
        model="builtin", messages=HELLO, response_format=city, temperature=0, max_tokens=300
    )
    assert isinstance(parsed.choices[0].message.parsed, city)


def test_several_answers_with_logprobs(client: Any) -> None:
    answer = ask(client, n=3, logprobs=True, top_logprobs=2, temperature=1, seed=5, max_tokens=8)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert choice.logprobs.content and len(choice.logprobs.content[0].top_logprobs) == 2
        assert "".join(one.token for one in choice.logprobs.content) == choice.message.content


def test_completions(client: Any) -> None:
    asked: dict[str, Any] = {"model": "builtin", "temperature": 0, "max_tokens": 6}
    one = client.completions.create(prompt="The list", echo=True, logprobs=2, **asked)
    assert one.choices[0].text.startswith("The list")
    assert "".join(one.choices[0].logprobs.tokens) == one.choices[0].text
    several = client.completions.create(prompt=["The list", [5, 6]], n=2, **asked)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert "The list" + several.choices[0].text == one.choices[0].text
    chunks = client.completions.create(prompt="The list", stream=True, **asked)
    assert "".join(chunk.choices[0].text for chunk in chunks) == several.choices[0].text


@pytest.mark.parametrize("url", ["/v1/chat/completions", "/v1/completions"])
def test_files_and_batches(client: Any, url: str) -> None:
    body = {**chat("Hello there", max_tokens=5), "prompt": "Hello"}
    lines = [
        json.dumps({"custom_id": f"c{n}", "method": "POST", "url": url, "body": body})
        for n in range(5)
    ]
    raw = "\n".join([*lines, "nonsense"]).encode()
    file = client.files.create(file=("in.jsonl", raw), purpose="batch")
    assert client.files.retrieve(file.id).bytes == len(raw)
    assert client.files.content(file.id).read() == raw
    batch = client.batches.create(
        input_file_id=file.id, endpoint=url, completion_window="24h", metadata={"for": "test"}
    )
    while client.batches.retrieve(batch.id).status != "completed":
        time.sleep(0.2)
    batch = client.batches.retrieve(batch.id)
    assert batch.metadata == {"for": "test"}
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (6, 5, 1)
    output = [json.loads(x) for x in client.files.content(batch.output_file_id).text.splitlines()]
    assert {one["custom_id"] for one in output} == {f"c{n}" for n in range(5)}
    assert len(client.files.content(batch.error_file_id).text.splitlines()) == 1
    assert batch.id in [one.id for one in client.batches.list()]
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)
    assert client.files.delete(file.id).deleted
    assert file.id not in [one.id for one in client.files.list()]


@pytest.mark.parametrize(
    ("kind", "fields", "param"),
    [
        ("BadRequestError", {"temperature": 9}, "temperature"),
        ("BadRequestError", {"messages": []}, "messages"),
        ("BadRequestError", {"functions": [{"name": "f"}]}, "functions"),
        ("NotFoundError", {"model": "gpt-9"}, "model"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_by_type(
    client: Any, kind: str, fields: dict[str, Any], param: str, stream: bool
) -> None:
    given = {"model": "builtin", "messages": HELLO, "stream": stream, **fields}
    with pytest.raises(getattr(openai, kind)) as caught:
        client.chat.completions.create(**given)
    error = caught.value
    assert error.param == param and error.type == "invalid_request_error" and error.code
    assert error.status_code == (404 if kind == "NotFoundError" else 400) and error.request_id


def test_what_is_not_there(client: Any) -> None:
    for call in (client.files.retrieve, client.batches.retrieve, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call("file-that-is-not-there")
    with pytest.raises(openai.BadRequestError):
        client.files.create(file=("x", b"x"), purpose="fine-tune")
