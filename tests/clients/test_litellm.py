"""LiteLLM against a real server, by both of the APIs that it knows it by."""

from typing import Any

import pytest

from tests.process import Server

HOW = "needs the group of clients: pip install --group clients"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("default:Accessing the .model_:DeprecationWarning"),  # its own
]


@pytest.fixture(scope="module")
def litellm() -> Any:
    """Imported without the list of prices that it would fetch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        return pytest.importorskip("litellm", reason=HOW)


@pytest.mark.parametrize(("api", "path"), [("openai", "/v1"), ("anthropic", "")])
def test_whole_streamed_and_a_second_turn(
    litellm: Any, server: Server, api: str, path: str
) -> None:
    said = [{"role": "user", "content": f"Hello there, {api}"}]

    def ask(messages: list[dict[str, str]], **fields: Any) -> Any:
        return litellm.completion(
            model=f"{api}/builtin",
            api_base=server.url + path,
            api_key="none",
            messages=messages,
            temperature=0,
            max_tokens=40,
            **fields,
        )

    whole = ask(said)
    answer = whole.choices[0].message.content
    assert answer and whole.usage.completion_tokens
    chunks = list(ask(said, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    longer = [*said, {"role": "assistant", "content": answer}, {"role": "user", "content": "And?"}]
    second = ask(longer)
    assert second.usage.prompt_tokens > whole.usage.prompt_tokens
    assert second.usage.prompt_tokens_details.cached_tokens >= whole.usage.prompt_tokens
