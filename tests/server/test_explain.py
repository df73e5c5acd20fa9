"""Explanations kept, told and looked up; and where in a request a token is."""

import gc
import json

import pytest

from agent_memory.block import Loss, common_tokens, token_bytes
from agent_memory.engine.explain import Asked, Cause
from agent_memory.model import loader
from agent_memory.request import Compared, Conversation, Finding, Started
from agent_memory.server import place
from agent_memory.server.explain import Explanations, described
from tests.conftest import builtin_model
from tests.engine.talks import TALKS, Talk
from tests.process import CHAT, Server, chat

TOKENIZER = builtin_model(8).tokenizer
SYSTEM = {"role": "system", "content": "You help. It is Monday, 9:59 AM. Be short."}
HELLO = {"role": "user", "content": "Hello"}
REPLY = {"role": "assistant", "content": "Hello! How can I help you?"}
MORE = {"role": "user", "content": "What time is it?"}
Message = dict[str, str]


def encoded(messages: list[Message]) -> list[int]:
    return TOKENIZER.encode_chat(Conversation(messages))


def started(compared: Compared, memory: int = 0, disk: int = 0, prompt: int = 100) -> Started:
    return Started(prompt, memory + disk, memory, disk, 0.0125, compared)


def compared(before: list[Message], now: list[Message], finding: Finding) -> Compared:
    one, other = (
        encoded(before),
        encoded(now),
    )
    at = common_tokens(token_bytes(one), token_bytes(other))
    return Compared(at, finding, token_bytes(one[at:]))


def added(
    explanations: Explanations,
    request_id: str,
    before: list[Message],
    now: list[Message],
    agent: str | None = "ann",
    finding: Finding = Finding.OWN,
) -> Cause:
    asked = Asked(agent, encoded(now), Conversation(now))
    event = started(compared(before, now, finding), memory=5)
    return explanations.add(request_id, "builtin", asked, event, TOKENIZER).cause


def test_what_is_kept_keeps_no_tokenizer_in_memory() -> None:
    """Of a model that was unloaded it would stay until a thousand requests have come."""
    explanations = Explanations()
    mine = loader.load_whole("builtin", None, 64).tokenizer
    asked = Asked("ann", encoded([TUESDAY]), Conversation([TUESDAY]))
    event = started(compared([SYSTEM], [TUESDAY], Finding.OWN))
    explained = explanations.add("r", "builtin", asked, event, mine)
    with_words = described(explained)["differs"]
    del mine
    gc.collect()
    without = described(explained)["differs"]
    assert with_words["prompt"] and with_words["remembered"]
    assert without == {**dict.fromkeys(with_words), "token": with_words["token"]}


TUESDAY = {**SYSTEM, "content": SYSTEM["content"].replace("Monday, 9:59", "Tuesday, 10:00")}


def test_an_explanation_tells_where_and_what() -> None:
    explanations = Explanations()
    cause = added(explanations, "r", [SYSTEM, HELLO], [TUESDAY, HELLO, REPLY, MORE])
    explained = explanations.get("r")
    assert explained is not None and cause is Cause.DATE_OR_COUNTER_CHANGED
    told = described(explained)
    differs = told.pop("differs")
    assert told["tokens"] == {
        "prompt": 100,
        "cached": 5,
        "memory": 5,
        "disk": 0,
        "went_back": 0,
    }
    assert (told["cause"], told["restore_ms"], told["lost"]) == (str(cause), 12.5, None)
    assert differs["field"] == "messages[0].content"
    at = differs["character"]
    assert TUESDAY["content"][at:].startswith(differs["prompt"][:20])
    assert SYSTEM["content"][at:].startswith(differs["remembered"][:20])
    assert differs["before"].endswith("You help. It is")
    assert len(differs["prompt"]) <= 40 and len(differs["before"]) <= 40
    json.dumps(told)


@pytest.mark.parametrize("changed", [1, 2, 3])
def test_the_message_is_named(changed: int) -> None:
    before = [SYSTEM, HELLO, REPLY, MORE]
    now = [
        *before[:changed],
        {**before[changed], "content": "Hello? No: Wh"},
        *before[changed + 1 :],
    ]
    explanations = Explanations()
    assert added(explanations, "r", before, now) is Cause.PROMPT_CHANGED
    explained = explanations.get("r")
    assert explained is not None
    assert described(explained)["differs"]["field"] == f"messages[{changed}].content"


def test_where_memory_is_lost_the_prompt_is_shown_alone() -> None:
    explanations = Explanations()
    asked = Asked("ann", encoded([SYSTEM, HELLO]), Conversation([SYSTEM, HELLO]))
    lost = started(Compared(3, Finding.LOST, loss=Loss.MISSING))
    explained = explanations.add("r", "builtin", asked, lost, TOKENIZER)
    assert explained.header == "miss; cause=evicted"
    told = described(explained)
    assert told["lost"] == "missing" and told["differs"]["remembered"] is None
    assert told["differs"]["field"] == "messages[0].content"


def test_a_whole_hit_differs_nowhere() -> None:
    explanations = Explanations()
    asked = Asked(None, encoded([HELLO]), Conversation([HELLO]))
    event = started(Compared(99, Finding.WHOLE), memory=60, disk=39)
    explained = explanations.add("r", "builtin", asked, event, TOKENIZER)
    assert explained.header == "hit; tokens=99/100; ram=60; disk=39"
    assert described(explained)["differs"] is None


def test_headers() -> None:
    asked = Asked(None, encoded([HELLO]), Conversation([HELLO]))
    for event, header in (
        (started(Compared(0, Finding.NOTHING)), "miss; cause=never_seen"),
        (
            started(Compared(9, Finding.OTHER_MODEL), disk=9),
            "partial; tokens=9/100; ram=0; disk=9; cause=other_model",
        ),
    ):
        assert Explanations().add("r", "m", asked, event, TOKENIZER).header == header


# ── kept ─────────────────────────────────────────────────────────────────────────────────────


def test_only_the_last_are_kept() -> None:
    explanations = Explanations(most=3)
    for name in "abcdb":
        added(explanations, name, [SYSTEM], [TUESDAY])
        explanations.check()
    assert [name for name in "abcd" if explanations.get(name)] == ["b", "c", "d"]


def test_long_ones_are_kept_for_a_shorter_time() -> None:
    explanations = Explanations(most_bytes=200_000)
    long = [{"role": "user", "content": "word " * 4000}]
    for n in range(20):
        added(explanations, str(n), [SYSTEM], long)
        explanations.check()
    assert 1 <= len(explanations) < 10 and explanations.get("19")
    added(explanations, "huge", [SYSTEM], [{"role": "user", "content": "word " * 50_000}])
    explanations.check()


def test_of_an_agent_that_is_deleted_no_word_is_left() -> None:
    explanations = Explanations()
    added(explanations, "ann's", [SYSTEM, HELLO], [TUESDAY, HELLO])
    added(explanations, "ben's", [SYSTEM, HELLO], [TUESDAY, MORE], "ben")
    added(explanations, "cyd's", [SYSTEM, HELLO], [TUESDAY, MORE], "cyd", Finding.OTHERS)
    explanations.forget_agent("ann")
    explanations.check()
    bens, cyds = explanations.get("ben's"), explanations.get("cyd's")
    assert explanations.get("ann's") is None and bens and cyds
    assert described(bens)["differs"]["remembered"]
    assert described(cyds)["differs"]["remembered"] is None


def test_a_stranger_is_not_quoted() -> None:
    explanations = Explanations()
    secret = [SYSTEM, {"role": "user", "content": "My secret is 7319."}]
    mine = [SYSTEM, {"role": "user", "content": "What is for lunch?"}]
    assert added(explanations, "r", secret, mine, "ben", Finding.OTHERS) is Cause.NEVER_SEEN
    explained = explanations.get("r")
    assert explained is not None and "secret" not in json.dumps(described(explained))


# ── places ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("talk", TALKS, ids=lambda talk: talk.name)
def test_every_character_of_a_prompt_has_its_place(talk: Talk) -> None:
    text = talk.second()
    for i, message in enumerate(talk.messages):
        start = text.rindex(message["content"]) if i != 1 else text.index(message["content"])
        for within in (0, 1, len(message["content"])):
            found = place.locate(text, start + within, talk.messages, talk.tools)
            assert found == (f"messages[{i}].content", within)
    assert place.locate(text, 0, talk.messages, talk.tools) == ("template", 0)
    assert place.locate(text, len(text), talk.messages, talk.tools)[0] == "template"
    for n, tool in enumerate(talk.tools):
        about = text.index(tool["function"]["name"] + ('"' if '"name"' in text else " ="))
        assert place.locate(text, about, talk.messages, talk.tools)[0] == f"tools[{n}]"


def test_contents_that_the_template_strips_or_leaves_out() -> None:
    messages = [{"content": "  Hi \n"}, {"content": ""}, {"content": "gone"}, {"content": "Bye"}]
    text = "<u>Hi</u><a></a><u>Bye</u>"
    places = [place.locate(text, text.index(word), messages, [])[0] for word in ("Hi", "Bye")]
    assert places == ["messages[0].content", "messages[3].content"]


def test_a_prompt_that_is_rendered_otherwise_by_now() -> None:
    tokens = encoded([SYSTEM, HELLO])
    found = place.find(TOKENIZER, Conversation([TUESDAY, HELLO]), tokens, 8)
    assert found["field"] is None and found["character"] is None
    text = TOKENIZER.render(Conversation([SYSTEM, HELLO]))
    assert found["before"] + found["prompt"] in text


# ── over HTTP ────────────────────────────────────────────────────────────────────────────────


def test_an_unknown_request(server: Server) -> None:
    answer = server.get("/v1/requests/nobody/explain")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "request_not_found"


def test_streams_have_the_header_too(server: Server) -> None:
    body = chat("Stream it", stream=True, max_tokens=4)
    headers = {"X-Request-ID": "streamed-1"}
    for expected in ("partial; ", "hit; "):
        with server.streamed("POST", CHAT, json=body, headers=headers) as answer:
            answer.read()
            assert answer.headers["x-cache"].startswith(("miss; cause=never_seen", expected))
    assert answer.headers["x-cache"].startswith("hit; ")
    assert server.get("/v1/requests/streamed-1/explain").json()["cause"] == "none"


def test_what_was_refused_was_not_looked_for(server: Server) -> None:
    answer = server.post({**chat("Hi"), "n": 99}, **{"X-Request-ID": "refused-1"})
    assert answer.status_code == 400 and "x-cache" not in answer.headers
    assert server.get("/v1/requests/refused-1/explain").status_code == 404


@pytest.mark.requirement("S-27")
def test_the_log_names_the_cause_and_no_text(server: Server) -> None:
    server.post(chat("tell me of zebras", max_tokens=4), **{"X-Request-ID": "logged-1"})
    (line,) = [e for e in server.events("request_done") if e["request_id"] == "logged-1"]
    assert line["cause"] == "never_seen" and line["matched"] >= 0 and line["restore_ms"] >= 0
    assert "zebra" not in server.log()
