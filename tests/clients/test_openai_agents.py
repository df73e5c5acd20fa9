"""openai-agents against a real server: a tool is called, and the next turn goes on from memory."""

from typing import Any, Literal

import pytest

from tests.process import Server

HOW = "needs the group of clients: pip install --group clients"
agents = pytest.importorskip("agents", reason=HOW)
openai = pytest.importorskip("openai", reason=HOW)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MODELS = ["OpenAIResponsesModel", "OpenAIChatCompletionsModel"]


def usage(run: Any) -> list[tuple[int, int]]:
    """Of each answer of the model: how long its prompt was, and how much of that was remembered."""
    used = [answer.usage for answer in run.raw_responses]
    return [(one.input_tokens, one.input_tokens_details.cached_tokens) for one in used]


@pytest.mark.parametrize("model", MODELS)
async def test_a_tool_and_a_second_turn_that_hears_of_it(server: Server, model: str) -> None:
    asked: list[str] = []

    def get_weather(city: Literal["Lisbon", "Oslo"]) -> str:
        """The weather of a city."""
        asked.append(city)
        return "Sunny."

    url = f"{server.url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        agent = agents.Agent(
            name="weather",
            instructions="You know the weather.",
            model=getattr(agents, model)(model="builtin", openai_client=client),
            tools=[agents.function_tool(get_weather)],
            tool_use_behavior="stop_on_first_tool",  # of its text the model might find no end
            model_settings=agents.ModelSettings(
                tool_choice="required",
                parallel_tool_calls=False,
                temperature=0,
                max_tokens=200,
                extra_headers={"X-Agent-ID": model},
            ),
        )
        quiet = agents.RunConfig(tracing_disabled=True)
        first = await agents.Runner.run(agent, "Is it sunny in Oslo?", run_config=quiet)
        longer = [*first.to_input_list(), {"role": "user", "content": "And in Lisbon?"}]
        second = await agents.Runner.run(agent, longer, run_config=quiet)
    assert len(asked) == 2 and set(asked) <= {"Lisbon", "Oslo"}
    assert (first.final_output, second.final_output) == ("Sunny.", "Sunny.")
    [(told, _)] = usage(first)
    [(_, cached)] = usage(second)
    assert cached >= told
