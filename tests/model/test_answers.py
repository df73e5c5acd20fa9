"""Thoughts, words and calls in text that comes in pieces, with tokenizers as models have them."""

import json
import shutil
from collections.abc import Iterable
from functools import cache
from itertools import groupby
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.utils import load_tokenizer
from tokenizers import AddedToken, Tokenizer

from agent_memory import builtin
from agent_memory.model.answers import (
    AnswerReader,
    CallArguments,
    CallBegins,
    Part,
    Thought,
    Words,
)
from agent_memory.model.tokenizer import ChatTokenizer
from agent_memory.request import Conversation

# Of these words in a chat template mlx-lm learns which form a model's calls have.
JSON = "{{ tools }} <tool_call> tool_call.name"
XML = "{{ tools }} <tool_call>\n<function="
MISTRAL = "{{ tools }} [TOOL_CALLS]"
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
ADD = '<tool_call>\n{"name": "add", "arguments": {"a": [1, "}\\""]}}\n</tool_call>'
ARGUMENTS = '{"a": [1, "}\\""]}'


@cache
def tokenizer(template: str) -> ChatTokenizer:
    folder = Path(mkdtemp(prefix="tokenizer-"))
    try:
        backend = Tokenizer.from_file(str(builtin.PATH / "tokenizer.json"))
        backend.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
        backend.add_special_tokens([AddedToken("[TOOL_CALLS]", special=True)])
        backend.save(str(folder / "tokenizer.json"))
        config = json.loads((builtin.PATH / "tokenizer_config.json").read_text("utf-8"))
        config["chat_template"] = template
        (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
        return ChatTokenizer(load_tokenizer(folder))
    finally:
        shutil.rmtree(folder)


def reader(
    template: str = JSON, *, said: str = "", tools: bool = True, forced: bool = False
) -> AnswerReader:
    made = tokenizer(template)
    return made.reader(made.encode(said), tools=TOOLS if tools else (), forced=forced)


def read(pieces: Iterable[str], by: AnswerReader) -> list[object]:
    """The parts, with neighbours joined; calls as (number, name, arguments)."""
    parts: list[Part] = [part for piece in pieces for part in by.add(piece)]
    parts += by.end()
    told: list[object] = []
    for kind, group in groupby(parts, key=type):
        same = list(group)
        if kind in (Words, Thought):
            told.append(kind("".join(part.text for part in same if isinstance(part, kind))))
    calls = [part for part in parts if isinstance(part, CallBegins)]
    assert len({call.id for call in calls}) == len(calls)
    for call in calls:
        pieces = [p.text for p in parts if isinstance(p, CallArguments) and p.number == call.number]
        told.append((call.number, call.name, "".join(pieces)))
    return told


@pytest.mark.requirement("B-07")
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("plain words ", [Words("plain words ")]),
        ("", []),
        ("<think>\nhm\n</think>\n\nYes.", [Thought("hm"), Words("Yes.")]),
        (f"I add.\n{ADD}", [Words("I add."), (0, "add", ARGUMENTS)]),
        (f"{ADD}\n{ADD}", [(0, "add", ARGUMENTS), (1, "add", ARGUMENTS)]),
        (f"<think>hm</think>{ADD}", [Thought("hm"), (0, "add", ARGUMENTS)]),
        ("a < b, <tool", [Words("a < b, <tool")]),
        ("<tool_call>\nno call\n</tool_call>", [Words("<tool_call>\nno call\n</tool_call>")]),
        ("<tool_call>\n{}\n</tool_call>", [Words("<tool_call>\n{}\n</tool_call>")]),
        ('<tool_call>{"name": "add", "argum', [Words('<tool_call>{"name": "add", "argum')]),
        ('<tool_call>{"name": "add", "arguments": {"a": 1', [(0, "add", '{"a": 1')]),
        ("<think>cut", [Thought("cut")]),
        (
            '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>',
            [(0, "add", '{"a": 1}')],
        ),
    ],
)
def test_what_an_answer_is_made_of(text: str, told: list[object]) -> None:
    assert read([text], reader()) == told
    assert read(text, reader()) == told  # letter by letter


@given(
    st.lists(st.sampled_from(["hm", " ", "\n", *"<>", "think", "/", "<think>", "</think>", ADD]))
)
def test_the_pieces_do_not_matter(pieces: list[str]) -> None:
    whole = read(["".join(pieces)], reader())
    assert read(pieces, reader()) == whole == read("".join(pieces), reader())


@given(st.lists(st.sampled_from(["a", " ", "\n", "<tool_call>", "</tool_call>", "{", "}"])))
def test_without_tools_calls_are_words_and_nothing_is_lost(pieces: list[str]) -> None:
    text = "".join(pieces)
    assert read(text, reader(tools=False)) == ([Words(text)] if text else [])


def test_arguments_come_as_they_are_written() -> None:
    by = reader()
    came = [part for letter in ADD for part in by.add(letter) if isinstance(part, CallArguments)]
    assert len(came) == len(ARGUMENTS)


def test_a_thought_that_the_prompt_has_opened() -> None:
    opened = "<|im_start|>assistant\n<think>\n"
    assert read("hm\n</think>\n\nYes.", reader(said=opened)) == [Thought("hm"), Words("Yes.")]
    closed = opened + "\n</think>\n\n"
    assert read("Yes.", reader(said=closed)) == [Words("Yes.")]
    made = tokenizer(JSON)
    assert made.end_of_thought(made.encode(opened)) == tuple(made.encode("</think>"))
    assert made.end_of_thought(made.encode(closed)) == ()


def test_other_forms_of_calls_are_read_when_they_are_whole() -> None:
    text = "<tool_call>\n<function=add>\n<parameter=a>\nx\n</parameter>\n</function>\n</tool_call>"
    assert read(text, reader(XML)) == [(0, "add", '{"a": "x"}')]
    assert read('[TOOL_CALLS]add[ARGS]{"a": 1}', reader(MISTRAL)) == [(0, "add", '{"a": 1}')]


def test_forced_calls_have_one_form_whatever_the_model() -> None:
    for template in (JSON, XML, MISTRAL):
        assert read(f"{ADD}\n{ADD}", reader(template, forced=True)) == [
            (0, "add", ARGUMENTS),
            (1, "add", ARGUMENTS),
        ]


def test_what_a_grammar_made_has_no_markers_but_its_own() -> None:
    """Between a JSON text's quotes the model's own are words like others."""
    text = '{"a": "<think>b</think> <tool_call>{}</tool_call>"}'
    assert read(text, reader(forced=True, tools=False)) == [Words(text)]
    thinking = reader(forced=True, tools=False, said="<|im_start|>assistant\n<think>\n")
    assert read(f"hm</think>\n{text}", thinking) == [Thought("hm"), Words(text)]


def test_markers_that_are_special_tokens_are_read() -> None:
    made = tokenizer(MISTRAL)
    stream = made.stream()
    tokens = made.encode('<|im_end|>[TOOL_CALLS]add[ARGS]{"a": 1}<|im_end|>')
    assert tokens[1] in made.special
    text = "".join(stream.add(token) for token in tokens)
    assert read([text], reader(MISTRAL)) == [(0, "add", '{"a": 1}')]


def test_the_builtin_template_knows_tools_and_writes_calls_as_they_are_forced() -> None:
    made = ChatTokenizer(load_tokenizer(builtin.PATH))
    assert "tools" in made.template_words
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": {"a": [1]}}}
    asked: list[dict[str, object]] = [
        {"role": "user", "content": "Add"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "1", "tool_call_id": "c"},
    ]
    one = '<tool_call>\n{"name": "add", "arguments": {"a": [1]}}\n</tool_call>'
    text = made.render(Conversation(asked, TOOLS))
    assert json.dumps(TOOLS[0]) in text
    assert f"<|im_start|>assistant\n{one}\n{one}<|im_end|>\n<|im_start|>tool\n1<|im_end|>" in text
    alone = made.render(Conversation(asked[:1]))
    assert alone == "<|im_start|>user\nAdd<|im_end|>\n<|im_start|>assistant\n"
