"""Answers of the Responses API: the events, in their order, and the items that come of them."""

from typing import Any

from agent_memory.errors import EngineFailed
from agent_memory.model.answers import CallArguments, CallBegins, Part, Thought, Words
from agent_memory.request import Conversation, TokenLogprob
from agent_memory.server import chat
from agent_memory.server.ask import Usage
from agent_memory.server.response_answer import Answer
from agent_memory.server.response_items import opened
from agent_memory.server.response_tools import Offer
from agent_memory.server.turn import Piece
from tests.server.responses import asked, told

PARTS: list[Part] = [
    Thought("h"),
    Thought("m"),
    Words("I "),
    Words("add."),
    CallBegins(0, "c0", "team__sub"),
    CallArguments(0, '{"a":'),
    CallArguments(0, " 1}"),
    CallBegins(1, "c1", "add"),
]


def answer(**more: bool) -> Answer:
    offer = Offer(names={"team__sub": ("team", "sub")})
    echo = asked(store=False).echo
    return Answer(
        "resp_1", "m", lambda token: b"%d" % token, offer, echo, **{"seals": True, **more}
    )


def events_of(made: Answer, parts: list[Part], reason: str = "stop") -> list[dict[str, Any]]:
    events = list(made.begin())
    for part in parts:
        events += made.add(Piece(0, (part,)))
    return [*events, *made.end(reason), made.over(reason, Usage(10, 4, 3, 2))]


def test_the_events_of_an_answer_come_in_order() -> None:
    events = events_of(answer(), PARTS)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"].removeprefix("response.") for event in events] == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added"),
        *("reasoning_text.delta", "reasoning_text.delta", "reasoning_text.done"),
        *("content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added"),
        *("output_text.delta", "output_text.delta", "output_text.done"),
        *("content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    done = [event["item"] for event in events if event["type"].endswith("item.done")]
    response = events[-1]["response"]
    assert response["output"] == done and response["status"] == "completed"
    thought, words, first, second = done
    assert thought["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert opened(thought["encrypted_content"]) == "hm"
    assert words["content"][0]["text"] == "I add."
    assert (first["name"], first["namespace"], first["arguments"]) == ("sub", "team", '{"a": 1}')
    assert (second["name"], second["arguments"], second["call_id"]) == ("add", "", "c1")
    assert [item["id"] for item in done] == ["rs_1_0", "msg_1_1", "fc_1_2", "fc_1_3"]
    assert response["usage"] == {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 6},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 13,
    }


def test_what_is_sent_back_is_what_a_chat_sends_back() -> None:
    """So the next prompt, and with it the memory, goes on from the answer."""
    message = chat.Message()
    for part in PARTS:
        message.add(part)
    prompt = chat.parse({"messages": [message.wire()]}, {}).ask.prompt
    assert isinstance(prompt, Conversation)
    for seals in (True, False):
        output = events_of(answer(seals=seals), PARTS)[-1]["response"]["output"]
        assert told(asked(input=output)).messages == prompt.messages


def test_an_answer_that_is_cut_short_says_so() -> None:
    last = events_of(answer(), PARTS, "length")[-1]
    assert last["type"] == "response.incomplete"
    response = last["response"]
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in response["output"]] == [*3 * ["completed"], "incomplete"]


def test_an_answer_of_nothing_is_an_empty_message() -> None:
    (item,) = events_of(answer(), [])[-1]["response"]["output"]
    assert item["type"] == "message" and item["content"][0]["text"] == ""


def test_an_error_ends_an_answer_with_what_it_was() -> None:
    made = answer()
    list(made.begin())
    event = made.failed(EngineFailed("broken"))
    assert (event["type"], event["sequence_number"]) == ("response.failed", 2)
    assert event["response"]["status"] == "failed"
    assert event["response"]["error"] == {"code": "server_error", "message": "broken"}


def test_logprobs_are_those_of_the_words() -> None:
    made = answer()
    list(made.begin())

    def add(token: int, *parts: Part) -> list[dict[str, Any]]:
        return list(made.add(Piece(0, parts, (TokenLogprob(token, -1.0, ((7, -0.5),)),))))

    add(1, Thought("hm"))
    add(2)  # the marker behind it
    assert not add(3, Words("a"))[-1]["logprobs"][1:]
    assert add(4) == []  # a part of a character
    (delta,) = add(5, Words("é"))
    assert [each["token"] for each in delta["logprobs"]] == ["4", "5"]
    assert delta["logprobs"][0]["top_logprobs"] == [{"token": "7", "logprob": -0.5, "bytes": [55]}]
    list(made.end("stop"))
    part = made.response("completed")["output"][1]["content"][0]
    assert [each["token"] for each in part["logprobs"]] == ["3", "4", "5"]
