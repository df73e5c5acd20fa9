"""Completions: what arrives, and over real sockets with the built-in model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_memory.errors import BadRequest, UnsupportedParameter
from agent_memory.request import TokenLogprob
from agent_memory.server.columns import Columns
from agent_memory.server.completions import MAX_PROMPTS, CompletionRequest, parse
from tests.conftest import builtin_model, ordinary_text
from tests.process import Server
from tests.server.test_chat import ANYTHING

PATH = "/v1/completions"
TEXT = ordinary_text()[:1500]
FIELDS = (
    "model prompt max_tokens temperature seed stop stream stream_options n best_of logprobs echo "
    "suffix logit_bias presence_penalty response_format ignore_eos priority"
).split()


def parsed(**fields: Any) -> CompletionRequest:
    return parse({"prompt": "Hello", **fields}, {})


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), ANYTHING))
def test_whatever_comes_is_a_request_or_a_bad_request(body: dict[str, Any]) -> None:
    for values in (body, {**body, "prompt": "Hello"}):
        try:
            request = parse(values, {})
        except BadRequest as error:
            assert error.param and f"'{error.param}'" in error.message
        else:
            assert 0 < len(request.asks) <= MAX_PROMPTS


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        ("", [""]),
        ([1, 2], [(1, 2)]),
        (["a", ""], ["a", ""]),
        ([[1], [2, 3]], [(1,), (2, 3)]),
        (["a", [1]], ["a", (1,)]),
    ],
    ids=str,
)
def test_prompts_of_every_kind(prompt: object, prompts: list[object]) -> None:
    assert [ask.prompt for ask in parsed(prompt=prompt).asks] == prompts


def test_what_is_not_said() -> None:
    (ask,) = parsed().asks
    assert (ask.max_tokens, ask.choices, ask.logprobs, ask.prompt_logprobs) == (16, 1, None, False)
    assert not ask.ignore_end


def test_an_echo_with_logprobs_scores_the_prompt() -> None:
    request = parsed(echo=True, logprobs=5, max_tokens=0, n=2, best_of=2)
    (ask,) = request.asks
    assert request.mute and ask.max_tokens == 1 and ask.choices == 2
    assert ask.prompt_logprobs and ask.logprobs == 5
    assert not parsed(echo=True).asks[0].prompt_logprobs


@pytest.mark.parametrize(
    ("field", "value", "place"),
    [
        ("prompt", None, "prompt"),
        ("prompt", 5, "prompt"),
        ("prompt", [], "prompt"),
        ("prompt", [1, "a"], "prompt[0]"),
        ("prompt", ["a", [1, True]], "prompt[1]"),
        ("prompt", ["a", [1.0]], "prompt[1]"),
        ("prompt", ["a"] * 129, "prompt"),
        ("max_tokens", 0, "max_tokens"),
        ("max_tokens", -1, "max_tokens"),
        ("logprobs", 6, "logprobs"),
        ("logprobs", True, "logprobs"),
        ("best_of", 2, "best_of"),
        ("n", 17, "n"),
        ("echo", 1, "echo"),
        ("suffix", 5, "suffix"),
    ],
)
def test_a_wrong_value_names_its_field(field: str, value: object, place: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parsed(**{field: value})
    assert caught.value.param == place


def test_a_suffix_is_refused() -> None:
    with pytest.raises(UnsupportedParameter):
        parsed(suffix="end")
    assert parsed(suffix="") == parsed()


def test_columns_of_a_text_in_pieces_of_characters() -> None:
    names = {0: b"<s>", 1: b" d\xc3", 2: b"\xa9j", 3: b"\xc3", 4: b"!", 5: b"<end>"}
    columns = Columns(names.__getitem__, {0, 5})
    scored = [TokenLogprob(1, -1.0, ((4, -0.5),)), TokenLogprob(2, -2.0)]
    table = columns.prompt("déj", 0, scored)
    assert table == {
        "tokens": ["<s>", "bytes:\\x20\\x64\\xc3", "bytes:\\xa9\\x6a"],
        "token_logprobs": [None, -1.0, -2.0],
        "top_logprobs": [
            None,
            {"!": -0.5, "bytes:\\x20\\x64\\xc3": -1.0},
            {"bytes:\\xa9\\x6a": -2.0},
        ],
        "text_offset": [0, 0, 1],
    }
    more = columns.more([TokenLogprob(token, -1.0) for token in (4, 5, 4)])
    assert more["text_offset"] == [3, 4, 4]


# ── over sockets ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Keeps K and V as they are, so that what it computes is what mlx-lm computes."""
    with Server(tmp_path_factory.mktemp("exact"), "--kv-bits", "none") as server:
        yield server.wait_ready()


def answer(server: Server, prompt: object, agent: str | None = None, **fields: object) -> Any:
    body = {"prompt": prompt, "temperature": 0, **fields}
    response = server.post(body, PATH, **({"X-Agent-ID": agent} if agent else {}))
    assert response.status_code == 200, response.text
    return response.json()


def cached(told: Any) -> int:
    return int(told["usage"]["prompt_tokens_details"]["cached_tokens"])


def tokens_of(text: str) -> list[int]:
    return builtin_model(None).tokenizer.encode(text, begin=True)


def plain_logprobs(tokens: list[int]) -> np.ndarray:
    """Of each token from the second on, by the model's own forward."""
    logits = builtin_model(None).model(mx.array([tokens]))[0].astype(mx.float32)
    told = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    own = mx.take_along_axis(told[:-1], mx.array(tokens[1:])[:, None], axis=-1)
    return np.array(own[:, 0])


def test_echoed_logprobs_are_those_of_the_models_own_forward(exact: Server) -> None:
    tokens = tokens_of(TEXT)
    told = answer(exact, tokens, echo=True, logprobs=1, max_tokens=1)["choices"][0]["logprobs"]
    assert len(told["tokens"]) == len(tokens) + 1 and told["token_logprobs"][0] is None
    assert "".join(told["tokens"][:-1]) == TEXT
    assert told["text_offset"][:2] == [0, len(told["tokens"][0])]
    np.testing.assert_allclose(told["token_logprobs"][1:-1], plain_logprobs(tokens), atol=1e-4)
    for logprob, top in zip(told["token_logprobs"][1:], told["top_logprobs"][1:], strict=True):
        assert logprob in top.values() and max(top.values()) >= logprob


def test_with_a_restored_beginning_logprobs_are_the_same(exact: Server) -> None:
    begin = TEXT + "\n\nAnd so it goes on:"
    cold = answer(exact, begin, "scored", max_tokens=20, logprobs=3)
    again = answer(exact, begin, "scored", max_tokens=20, logprobs=3)
    assert cached(again) == cold["usage"]["prompt_tokens"] - 1
    text = cold["choices"][0]["text"]
    echoed = answer(exact, begin + text, echo=True, logprobs=3, max_tokens=0)["choices"][0]
    first, second, third = (
        one["logprobs"] for one in (cold["choices"][0], again["choices"][0], echoed)
    )
    assert first["tokens"] == second["tokens"] and echoed["text"] == begin + text
    count = len(first["tokens"])
    assert third["tokens"][-count:] == first["tokens"]
    for one in (first, second):
        np.testing.assert_allclose(
            one["token_logprobs"], third["token_logprobs"][-count:], atol=1e-4
        )


def test_text_and_its_tokens_are_one_prompt(server: Server) -> None:
    from_text = answer(server, TEXT, "same")
    from_tokens = answer(server, tokens_of(TEXT), "same")
    assert from_text["choices"] == from_tokens["choices"]
    assert cached(from_tokens) == from_text["usage"]["prompt_tokens"] - 1


def test_what_was_said_is_remembered_over_a_restart(tmp_path: Path) -> None:
    with Server(tmp_path, "--kv-bits", "none") as before:
        first = answer(before.wait_ready(), TEXT[:900], "back", max_tokens=12)
        before.wait_on_disk("back", first["usage"]["total_tokens"] - 1)
    longer = TEXT[:900] + first["choices"][0]["text"] + " Then"
    with Server(tmp_path, "--kv-bits", "none") as after:
        cold = answer(after.wait_ready(), longer, echo=True, logprobs=0, max_tokens=12)
        warm = answer(after, longer, "back", max_tokens=12)
    assert cached(cold) == 0  # what is scored is computed
    assert cached(warm) >= first["usage"]["prompt_tokens"]
    assert cold["choices"][0]["text"] == longer + warm["choices"][0]["text"]


def test_several_prompts_are_numbered_on(server: Server) -> None:
    prompts = ["The list", "A string", "The list"] * 4
    told = answer(server, prompts, n=2, max_tokens=6)
    alone = {text: answer(server, text, max_tokens=6)["choices"][0]["text"] for text in prompts}
    assert [choice["index"] for choice in told["choices"]] == list(range(24))
    assert [choice["text"] for choice in told["choices"]] == [
        alone[text] for text in prompts for _ in range(2)
    ]
    assert told["usage"]["completion_tokens"] == 24 * 6


@pytest.mark.parametrize("fields", [{}, {"echo": True, "logprobs": 2}, {"echo": True}], ids=str)
def test_a_stream_says_the_same(server: Server, fields: dict[str, object]) -> None:
    asked: dict[str, Any] = {"n": 2, "max_tokens": 8, **fields}
    whole = answer(server, ["Once upon", "In the end"], **asked)
    stream = server.post(
        {
            "prompt": ["Once upon", "In the end"],
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **asked,
        },
        PATH,
    )
    events = [line.removeprefix("data: ") for line in stream.text.splitlines() if line]
    chunks = [json.loads(event) for event in events[:-1]]
    assert events[-1] == "[DONE]" and {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    for choice in whole["choices"]:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(one["text"] for one in own) == choice["text"]
        assert [one["finish_reason"] for one in own if one["finish_reason"]] == ["length"]
        if choice["logprobs"] is not None:
            for name, column in choice["logprobs"].items():
                parts = [entry for one in own for entry in one["logprobs"][name]]
                assert len(parts) == len(column)
                assert name == "top_logprobs" or parts == pytest.approx(column)


def test_nothing_but_the_prompt(server: Server) -> None:
    told = answer(server, "Just this", echo=True, max_tokens=0, logprobs=0)
    (choice,) = told["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("Just this", "length")
    assert told["usage"]["completion_tokens"] == 0 and len(choice["logprobs"]["tokens"]) > 1


def test_one_token_is_told_whichever_it_is(server: Server) -> None:
    (end, *_) = builtin_model(8).tokenizer.end_of_turn
    biased: dict[str, Any] = {"logit_bias": {str(end): 100}, "logprobs": 1}
    one = answer(server, "Then", max_tokens=1, **biased)["choices"][0]
    assert len(one["logprobs"]["tokens"]) == 1 and one["text"] == ""
    many = answer(server, "Then", max_tokens=5, **biased)["choices"][0]
    assert many["finish_reason"] == "stop" and many["logprobs"]["tokens"] == []


def test_an_answer_in_a_form(server: Server) -> None:
    form = {"type": "json_object"}
    told = answer(server, "JSON:", response_format=form, max_tokens=200, seed=1, temperature=1)
    assert told["choices"][0]["text"].startswith("{")


@pytest.mark.parametrize(
    ("prompt", "place"),
    [
        ("", "prompt"),
        ([[1], []], "prompt[1]"),
        ([5, 2048], "prompt"),
        ([["a"], "b"], "prompt[0]"),
        ("word " * 9000, "prompt"),
        ([[-1]], "prompt"),
        ([10**40], "prompt"),
    ],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_prompt_is_named_and_harms_nobody(
    server: Server, prompt: object, place: str, stream: bool
) -> None:
    response = server.post({"prompt": prompt, "stream": stream}, PATH)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, place)
    assert answer(server, "Hello", max_tokens=1)["choices"][0]["text"]
