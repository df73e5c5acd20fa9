"""pydantic-ai against a real server: tools, output of a type, and turns that go on from memory."""

from typing import Any, Literal

import pytest

from tests.process import Server

HOW = "needs the group of clients: pip install --group clients"
ai = pytest.importorskip("pydantic_ai", reason=HOW)
models = pytest.importorskip("pydantic_ai.models.openai", reason=HOW)
providers = pytest.importorskip("pydantic_ai.providers.openai", reason=HOW)
pydantic = pytest.importorskip("pydantic", reason=HOW)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MODELS = ["OpenAIChatModel", "OpenAIResponsesModel"]


def settings(run: Any) -> dict[str, Any]:
    """First the weather, then what came of it."""
    tool = "get_weather" if run.run_step == 1 else "final_result"
    return {"tool_choice": [tool], "temperature": 0, "max_tokens": 200}


def usage(run: Any) -> list[tuple[int, int]]:
    """Of each answer of the model: how long its prompt was, and how much of that was remembered."""
    answers = [message for message in run.new_messages() if message.kind == "response"]
    return [(one.usage.input_tokens, one.usage.cache_read_tokens) for one in answers]


@pytest.mark.parametrize("model", MODELS)
async def test_a_tool_loop_and_a_second_turn(server: Server, model: str) -> None:
    asked: list[str] = []

    def get_weather(city: Literal["Lisbon", "Oslo"]) -> str:
        """The weather of a city."""
        asked.append(city)
        return "Sunny."

    form = pydantic.create_model("Form", sunny=(bool, ...))
    url = f"{server.url}/v1"
    async with providers.OpenAIProvider(base_url=url, api_key="none") as provider:
        agent = ai.Agent(
            getattr(models, model)("builtin", provider=provider),
            instructions=f"You know the weather and are asked by {model}.",
            tools=[get_weather],
            output_type=form,
            model_settings=settings,
        )
        first = await agent.run("Is it sunny in Oslo?")
        second = await agent.run("And in Lisbon?", message_history=first.all_messages())
    assert len(asked) == 2 and set(asked) <= {"Lisbon", "Oslo"}
    assert isinstance(first.output, form) and isinstance(second.output, form)
    (called, _), (told, after_call) = usage(first)
    assert after_call >= called
    for _, cached in usage(second):
        assert cached >= told
