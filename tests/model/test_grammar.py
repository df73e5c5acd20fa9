"""Masks allow what the grammar allows, and hostile grammars end in BadRequest or in an answer."""

import json
import threading
import time
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from agent_memory import builtin
from agent_memory.errors import BadRequest
from agent_memory.model import forms
from agent_memory.model.forms import ANY_OBJECT, Form
from agent_memory.model.grammar import (
    MAX_GRAMMAR_BYTES,
    Constraint,
    Grammars,
)


def json_schema(schema: dict[str, Any]) -> str:
    return forms.grammar(Form(schema, strict=True), (), several=False, after_thought=False)


def any_json_object() -> str:
    return json_schema(ANY_OBJECT)


BACKEND = Tokenizer.from_file(str(builtin.PATH / "tokenizer.json"))
VOCAB = BACKEND.get_vocab_size()
ENDS = (2, 1)
GRAMMARS = Grammars(BACKEND.to_str, VOCAB, ENDS)
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def ids(text: str) -> list[int]:
    return list(BACKEND.encode(text, add_special_tokens=False).ids)


def follow(constraint: Constraint, text: str) -> bool:
    """Whether each of its tokens is allowed in turn."""
    for token in ids(text):
        if not constraint.mask()[token]:
            return False
        constraint.accept(token)
    return True


def written(constraint: Constraint, seed: int, most: int = 300) -> tuple[list[int], bool]:
    """Random allowed tokens up to the end -> they, and whether there was one."""
    rng, tokens = np.random.default_rng(seed), list[int]()
    while len(tokens) < most and not constraint.is_over:
        token = int(rng.choice(np.flatnonzero(constraint.mask())))
        if token in ENDS:
            return tokens, True
        tokens.append(token)
        constraint.accept(token)
    return tokens, constraint.is_over


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ('{"name": "ann", "age": 41}', True),
        ('{"name":"ann","age":41}', False),
        ('{\n  "name": "ann",\n  "age": -3\n}', False),
        ('{"name": "ann", "age": "41"}', False),
        ('{"age": 41}', False),
        ('{"name": "much too long", "age": 41}', False),
        ('["name"]', False),
    ],
)
def test_what_fits_a_schema_is_allowed_and_nothing_else(text: str, fits: bool) -> None:
    constraint = GRAMMARS.constraint(json_schema(PERSON))
    assert follow(constraint, text) is fits
    assert constraint.is_over is fits
    assert not fits or set(np.flatnonzero(constraint.mask())) == set(ENDS)


def test_random_allowed_tokens_make_json_of_the_schema() -> None:
    num_ended = 0
    for seed in range(20):
        tokens, ended = written(GRAMMARS.constraint(json_schema(PERSON)), seed)
        if ended:  # the others had spaces and digits as many as fit
            num_ended += 1
            answer = json.loads(BACKEND.decode(tokens, skip_special_tokens=False))
            assert answer.keys() == {"name", "age"}
            assert len(answer["name"]) <= 8 and isinstance(answer["age"], int)
    assert num_ended >= 10


def test_every_end_of_turn_may_come_where_the_grammar_lets_it_end() -> None:
    constraint = GRAMMARS.constraint("start: /[0-9]+/")
    assert not constraint.mask()[list(ENDS)].any()
    assert follow(constraint, "12")
    assert constraint.mask()[list(ENDS)].all() and not constraint.is_over
    assert not constraint.mask()[[0, 3]].any()


def test_a_copy_goes_its_own_way() -> None:
    constraint = GRAMMARS.constraint('start: "one" | "two"')
    copy = constraint.copy()
    assert follow(copy, "two") and copy.is_over
    assert not constraint.is_over and follow(constraint, "one")


@pytest.mark.parametrize("width", [VOCAB - 1000, VOCAB, VOCAB + 1, VOCAB + 100])
def test_the_mask_is_as_wide_as_logits_are(width: int) -> None:
    """Places that no token has are never allowed; a tokenizer may have more tokens than places."""
    grammars = Grammars(BACKEND.to_str, width, ENDS)
    mask = grammars.constraint(any_json_object()).mask()
    assert mask.shape == (width,) and not mask[VOCAB:].any()
    np.testing.assert_array_equal(
        mask[:VOCAB], GRAMMARS.constraint(any_json_object()).mask()[:width]
    )


@pytest.mark.requirement("S-14")
@pytest.mark.parametrize(
    ("grammar", "why"),
    [
        ("nonsense", "nonsense"),
        ("start: foo", "foo"),
        (json_schema({"type": "frob"}), "frob"),
        (json_schema({"not": {}}), "not"),
        (json_schema({"type": "string", "minLength": 5, "maxLength": 2}), "minLength"),
        (json_schema({"enum": []}), "empty"),
        (json_schema({"type": "string", "pattern": "(?=a)b"}), "look-around"),
        (json_schema({"$ref": "#"}), "no text"),
        (json_schema({"$ref": "http://example.invalid/x"}), "example.invalid"),
        (json_schema({"enum": ["x" * MAX_GRAMMAR_BYTES]}), "bytes"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_the_reason(grammar: str, why: str) -> None:
    with pytest.raises(BadRequest, match=why) as refused:
        GRAMMARS.constraint(grammar)
    assert refused.value.code == "invalid_grammar" and refused.value.status == 400


def chain(link: str) -> str:
    """As many definitions as there is room for, each of which refers to the next."""
    links, size = list[str](), 100
    while size < MAX_GRAMMAR_BYTES:
        links.append(link.replace("HERE", f"a{len(links)}").replace("NEXT", f"a{len(links) + 1}"))
        size += len(links[-1]) + 1
    return json_schema(json.loads(f'{{"$ref": "#/$defs/a0", "$defs": {{{",".join(links[:-9])}}}}}'))


HOSTILE = {
    "deep": json_schema(json.loads('{"items":' * 100 + "{}" + "}" * 100)),
    "deeper": "start: " + "(" * 30_000 + '"a"' + ")" * 30_000,
    "long chain": chain('"HERE":{"$ref":"#/$defs/NEXT"}'),
    "branching chain": chain('"HERE":{"anyOf":[{"$ref":"#/$defs/NEXT"},{"type":"null"}]}'),
    "rules": "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(4000)) + 'r4000: "a"',
    "many words": "start: " + " | ".join(f'"w{i}"' for i in range(6000)),
    "huge regex": "start: /" + "a?" * 30_000 + "/",
    "large regex": json_schema({"type": "string", "pattern": "^" + "a?" * 4000 + "$"}),
    "many states": json_schema({"type": "string", "pattern": "^(a|b)*a(a|b){400}$"}),
    "counted": 'start: "a"{1000000}',
    "doubling": "start: A0\n"
    + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(25))
    + "A25: /a?/",
    "long": json_schema({"type": "string", "minLength": 10**9}),
    "many items": json_schema({"type": "array", "minItems": 10**9, "items": {"type": "integer"}}),
    "endless": json_schema({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}),
    "ambiguous": 'start: a\na: a a | "x" | "xx" | ""',
    "empty": 'start: ""',
    "many properties": json_schema({"required": [f"p{i}" for i in range(6000)]}),
    "choices": json_schema(
        {"allOf": [{"anyOf": [{"required": [f"p{i}{j}"]} for j in range(4)]} for i in range(12)]}
    ),
}


@pytest.mark.requirement("S-14")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_take_bounded_time_and_end_nothing(name: str) -> None:
    """Compiled in one thread as a worker does it, followed in another with a small stack."""
    began = time.monotonic()
    try:
        constraint = GRAMMARS.constraint(HOSTILE[name])
    except BadRequest:
        return
    finally:
        assert time.monotonic() - began < 20
    slowest: list[float] = []

    def follow_it() -> None:
        for seed in range(60):
            began = time.monotonic()
            try:
                allowed = np.flatnonzero(constraint.mask())
            except BadRequest:
                return
            constraint.accept(int(np.random.default_rng(seed).choice(allowed)))
            slowest.append(time.monotonic() - began)
            if constraint.is_over:
                return

    thread = threading.Thread(target=follow_it)
    thread.start()
    thread.join(60)
    assert not thread.is_alive() and max(slowest, default=0.0) < 2
