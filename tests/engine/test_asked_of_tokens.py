"""What requests ask of their tokens, through the real engine: grammars, penalties, logprobs."""

import asyncio
import json
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten

from agent_memory.engine.engine import Engine
from agent_memory.errors import BadRequest
from agent_memory.model import loader
from agent_memory.request import (
    Delta,
    Failed,
    Finding,
    Finished,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    Scored,
    Started,
    TokenLogprob,
)
from tests.conftest import builtin_model, ordinary_text
from tests.engine.test_engine import ENDLESS, FACTS, GREEDY, running, steps_of, tokenized
from tests.marks import first_is_fast
from tests.model import tiny
from tests.model.test_grammar import any_json_object, json_schema

SCHEMA = json_schema(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "colour": {"enum": ["red", "green", "blue"]},
            "old": {"type": "boolean"},
        },
        "required": ["name", "colour", "old"],
        "additionalProperties": False,
    }
)
WARM = SamplingParams(temperature=1.0, seed=5)


@dataclass
class Told:
    """`tokens`: as far as logprobs were told."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    scored: list[TokenLogprob] = field(default_factory=list)
    started: Started | None = None
    finished: Finished | None = None

    @property
    def tokens(self) -> list[int]:
        return [one.token for one in self.logprobs]


async def ask(
    engine: Engine,
    prompt: str | tuple[int, ...],
    agent: str | None = "ann",
    grammar: str | None = None,
    sampling: SamplingParams = GREEDY,
    max_tokens: int = 120,
    logprobs: int | None = 0,
    prompt_logprobs: bool = False,
    ignore_end: bool = False,
    stop: tuple[str, ...] = (),
    send_back_after: int | None = None,
    under_way: asyncio.Event | None = None,
) -> Told:
    """`send_back_after`: so many events it is sent back to wait, once.  `under_way`: set when 20
    tokens have been generated."""
    tokens = prompt if isinstance(prompt, tuple) else await tokenized(engine, prompt)
    told, num_events = Told(), 0
    request = GenerateRequest(
        f"r{id(told)}",
        agent,
        tokens,
        sampling,
        max_tokens,
        stop,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        ignore_end=ignore_end,
    )

    def send_back() -> None:
        steps = steps_of(engine)
        for seq in list(steps.scheduler.admitted):
            if seq.request.id == request.id:
                steps._preempt(seq)

    constraint = await engine.models.default.constraint(grammar) if grammar else None
    async with aclosing(engine.models.default.generate(request, constraint)) as events:
        async for event in events:
            num_events += 1
            if num_events == send_back_after:
                await engine._on_thread(send_back)
            match event:
                case Started():
                    told.started = event
                case Scored(logprobs=scored):
                    assert not told.text and not told.logprobs
                    told.scored += scored
                case Delta():
                    if under_way and event.num_tokens >= 20:
                        under_way.set()
                    told.text += event.text
                    told.logprobs += event.logprobs
                    assert logprobs is None or len(told.logprobs) <= event.num_tokens
                case Failed(error):
                    raise error
                case Finished():
                    told.finished = event
    return told


def plain_logprobs(model: Module, tokens: list[int]) -> np.ndarray:
    """[tokens, vocab], of the model's own forward."""
    out: mx.array = model(mx.array([tokens]))
    logits = np.array(out[0].astype(mx.float32)).astype(np.float64)
    top = logits.max(-1, keepdims=True)
    logprobs: np.ndarray = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return logprobs


def check_against(
    want: np.ndarray, told: list[TokenLogprob], num_top: int, atol: float = 1e-4
) -> None:
    """want [len(told), vocab]."""
    for row, one in zip(want, told, strict=True):
        assert abs(one.logprob - row[one.token]) < atol
        assert len(one.top) == num_top
        np.testing.assert_allclose([v for _, v in one.top], np.sort(row)[::-1][:num_top], atol=atol)
        np.testing.assert_allclose([row[i] for i, _ in one.top], [v for _, v in one.top], atol=atol)


def check_fits(told: Told) -> None:
    answer = json.loads(told.text)
    assert answer.keys() == {"name", "colour", "old"} and len(answer["name"]) <= 12
    assert answer["colour"] in ("red", "green", "blue") and isinstance(answer["old"], bool)
    assert told.finished is not None and told.finished.reason is FinishReason.STOP
    assert told.finished.completion_tokens - len(told.tokens) in (0, 1)  # an end of turn


async def test_constrained_answers_fit_alone_and_beside_free_ones_that_are_as_ever(
    tmp_path: Path,
) -> None:
    """Restored, too, they are what they were cold."""
    free = [FACTS, ENDLESS, "Hello!"]
    bound = [("Who are you?", GREEDY), ("Who are you?", WARM), (FACTS + " Who?", WARM)]
    async with running(tmp_path / "alone") as engine:
        alone = [await ask(engine, p, f"f{i}", max_tokens=60) for i, p in enumerate(free)]
        for i, (p, how) in enumerate(bound):
            alone.append(await ask(engine, p, f"b{i}", SCHEMA, how))
            again = await ask(engine, p, f"b{i}", SCHEMA, how)
            assert again.started is not None and again.started.cached_tokens > 0
            assert again.tokens == alone[-1].tokens
        for told in alone[3:]:
            check_fits(told)
    async with running(tmp_path / "at-once") as engine:
        at_once = await asyncio.gather(
            *(ask(engine, p, f"f{i}", max_tokens=60) for i, p in enumerate(free)),
            *(ask(engine, p, f"b{i}", SCHEMA, how) for i, (p, how) in enumerate(bound)),
        )
    assert [told.tokens for told in at_once] == [told.tokens for told in alone]


async def test_sent_back_to_wait_and_after_a_failed_step_it_goes_on_as_it_would_have(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as engine:
        want = await ask(engine, "Who are you?", "a", SCHEMA, WARM)
        for after in (2, 6, 11):
            got = await ask(engine, "Who are you?", "b", SCHEMA, WARM, send_back_after=after)
            assert got.tokens == want.tokens
        under_way = asyncio.Event()
        endless = ask(engine, ENDLESS, "c", max_tokens=60, under_way=under_way)
        spoilt = asyncio.create_task(endless)
        await under_way.wait()
        beside = asyncio.create_task(ask(engine, "Who are you?", "d", SCHEMA, WARM))
        while not await engine._on_thread(partial(spoil_a_step, engine)):
            pass
        assert (await beside).tokens == want.tokens
        assert len((await spoilt).tokens) == 60
        assert engine._residents._metrics.step_failures._value.get() == 1


def spoil_a_step(engine: Engine) -> bool:
    """With a wrong shape in a tail, once a constrained sequence is in the same step."""
    running = [seq for seq in steps_of(engine).scheduler.admitted if seq.kv]
    bound = any(seq.constraint and seq.num_generated > 2 for seq in running)
    for seq in running:
        if bound and not seq.constraint and seq.kv:
            for tail in seq.kv.tails.values():
                tail.arrays = [mx.zeros((1, 7, 512, 64)) for _ in tail.arrays]
            return True
    return not running


async def test_a_shutdown_in_the_middle_ends_a_constrained_answer(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        under_way = asyncio.Event()
        grammar = "start: /(.|\\n)*/"
        endless = asyncio.create_task(
            ask(engine, ENDLESS, grammar=grammar, max_tokens=4000, under_way=under_way)
        )
        await under_way.wait()
        engine.stop_admission()
        hurry = asyncio.Event()
        hurry.set()
        assert (await engine.drain(5, hurry))["ended"] == 1
        told = await endless
        assert told.finished is not None and told.finished.reason is FinishReason.SHUTDOWN


async def test_grammars_that_end_and_that_turn_out_too_complex(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        word = await ask(engine, "Hello!", grammar='start: "exactly this"')
        assert word.text == "exactly this" and word.finished is not None
        assert word.finished.reason is FinishReason.STOP
        words = " | ".join(f'"w{i}"' for i in range(5000))
        with pytest.raises(BadRequest, match="complex"):
            await ask(engine, "Hello!", grammar=f'start: "exactly this" ({words})')
        with pytest.raises(BadRequest, match="foo"):
            await ask(engine, "Hello!", grammar="start: foo")
        await ask(engine, "Hello!", grammar=any_json_object(), sampling=WARM, max_tokens=30)
        assert (await ask(engine, "Hello!")).text


async def test_logprobs_are_those_of_a_plain_forward(tmp_path: Path) -> None:
    model = builtin_model(None).model
    async with running(tmp_path) as engine:
        prompt = await tokenized(engine, FACTS)
        cold, one = await asyncio.gather(
            ask(engine, prompt, max_tokens=20, logprobs=4),
            ask(engine, ENDLESS, "eve", max_tokens=12, logprobs=1),
        )
        restored = await ask(engine, prompt, max_tokens=20, logprobs=4)
        held = await ask(engine, prompt, max_tokens=20, logprobs=4, stop=(cold.text[5:9],))
        whole = prompt + tuple(cold.tokens)
        scored = await ask(engine, whole, max_tokens=1, logprobs=4, prompt_logprobs=True)
        untold = await ask(engine, prompt, max_tokens=20, logprobs=None)
    assert restored.started is not None and restored.started.cached_tokens == len(prompt) - 1
    assert cold.finished is not None and held.finished is not None
    assert len(cold.tokens) == cold.finished.completion_tokens - (
        cold.finished.reason is FinishReason.STOP
    )
    assert len(held.tokens) == held.finished.completion_tokens < len(cold.tokens)
    assert untold.text == cold.text and not untold.logprobs
    assert len(one.tokens) == 12 and all(len(told.top) == 1 for told in one.logprobs)
    want = plain_logprobs(model, list(whole))
    check_against(want[len(prompt) - 1 : -1], cold.logprobs, 4)
    check_against(want[len(prompt) - 1 : -1], restored.logprobs, 4)
    check_against(want[:-1], scored.scored, 4)
    mx.clear_cache()


@pytest.mark.parametrize("step_tokens", first_is_fast(64, 512))
async def test_a_prompt_is_scored_whole_once_and_remembered(
    tmp_path: Path, step_tokens: int
) -> None:
    model = builtin_model(None).model
    async with running(tmp_path, step_tokens=step_tokens) as engine:
        prompt = await tokenized(engine, FACTS)
        await ask(engine, prompt, "before", max_tokens=5)
        told, sent_back, beside = await asyncio.gather(
            ask(engine, prompt, "a", max_tokens=5, prompt_logprobs=True),
            ask(engine, prompt, "b", max_tokens=5, prompt_logprobs=True, send_back_after=3),
            ask(engine, prompt, "c", max_tokens=5),
        )
        after = await ask(engine, (*prompt[:9], 99, *prompt[9:]), "d", prompt_logprobs=True)
        again = await ask(engine, (*prompt[:9], 99, *prompt[9:]), "d")
        short = await ask(engine, prompt[:1], "e", max_tokens=2, prompt_logprobs=True)
    assert told.started is not None and beside.started is not None and again.started is not None
    assert told.started.cached_tokens == 0
    assert told.started.compared.finding is Finding.NOT_LOOKED
    assert beside.started.cached_tokens == len(prompt) - 1
    assert again.started.cached_tokens == len(prompt)
    assert told.tokens == sent_back.tokens == beside.tokens
    assert not short.scored and len(after.scored) == len(prompt)
    want = plain_logprobs(model, list(prompt))[:-1]
    for one in (told, sent_back):
        assert [s.token for s in one.scored] == list(prompt[1:])
        check_against(want, one.scored, 0)
    total = want[np.arange(len(prompt) - 1), list(prompt[1:])].sum()
    assert abs(sum(s.logprob for s in told.scored) - total) < 1e-2
    mx.clear_cache()


@pytest.mark.parametrize("kind", ["qwen3_5", "deepseek_v3", "gemma3"])
async def test_every_kind_of_model_scores_prompts(tmp_path: Path, kind: str) -> None:
    folder = tiny.save(kind, tmp_path / kind, "{{ messages[0]['content'] }}")
    async with running(tmp_path / "a", model=str(folder), step_tokens=64) as engine:
        prompt = await tokenized(engine, ordinary_text()[:900])
        await ask(engine, prompt, "a", max_tokens=3)
        told, beside = await asyncio.gather(
            ask(engine, prompt, "b", max_tokens=3, logprobs=2, prompt_logprobs=True),
            ask(engine, prompt[:50], "c", max_tokens=30),
        )
        later = await ask(engine, prompt, "a", max_tokens=3)
    assert beside.tokens and told.tokens == later.tokens
    model = loader.load_whole(str(folder), None, 64).model
    check_against(plain_logprobs(model, list(prompt))[:-1], told.scored, 2)


async def test_bias_forces_and_forbids_and_penalties_count_what_was_generated(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as engine:
        vocab_size = engine.models.default.known.vocab_size
        free = await ask(engine, ENDLESS, max_tokens=30)
        [(most, count)] = [(t, free.tokens.count(t)) for t in set(free.tokens[:1])]
        forced = await ask(
            engine, ENDLESS, sampling=SamplingParams(0, logit_bias=((50, 100.0),)), max_tokens=9
        )
        assert forced.tokens == [50] * 9
        without = SamplingParams(
            1.0, seed=1, logit_bias=tuple((t, -100.0) for t in set(free.tokens))
        )
        assert not set((await ask(engine, ENDLESS, sampling=without, max_tokens=30)).tokens) & set(
            free.tokens
        )
        once = SamplingParams(0, presence_penalty=100.0)
        various = await ask(engine, ENDLESS, sampling=once, max_tokens=30, ignore_end=True)
        assert len(set(various.tokens)) == 30
        sent_back = await ask(
            engine, ENDLESS, sampling=once, max_tokens=30, ignore_end=True, send_back_after=9
        )
        assert sent_back.tokens == various.tokens
        often = SamplingParams(0, frequency_penalty=50.0)
        fewer = await ask(engine, ENDLESS, sampling=often, max_tokens=30, ignore_end=True)
        assert count > 2 and fewer.tokens.count(most) <= 2
        for token in (-1, vocab_size):
            with pytest.raises(BadRequest) as refused:
                await ask(engine, "Hi", sampling=SamplingParams(logit_bias=((token, 1.0),)))
            assert refused.value.param == "logit_bias"
        for num_top in (-1, 21):
            with pytest.raises(BadRequest) as refused:
                await ask(engine, "Hi", logprobs=num_top)
            assert refused.value.param == "logprobs"


async def test_the_end_of_turn_is_no_token_of_the_answer_unless_it_ends_nothing(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as engine:
        ends = await ask(engine, "Hello!")
        goes_on = await ask(engine, "Hello!", ignore_end=True, max_tokens=40)
        end_of_turn = engine.models.default.tokenizer.end_of_turn
    assert ends.finished is not None and goes_on.finished is not None
    assert ends.finished == Finished(FinishReason.STOP, len(ends.tokens) + 1)
    assert goes_on.finished == Finished(FinishReason.LENGTH, 40) and len(goes_on.tokens) == 40
    assert not set(ends.tokens) & end_of_turn and set(goes_on.tokens) & end_of_turn
    assert goes_on.text.startswith(ends.text) and "<|im_end|>" not in goes_on.text


async def test_places_of_the_logits_that_no_token_has_are_never_drawn(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "wide")
    facts = json.loads((folder / "config.json").read_text()) | {"vocab_size": 3000}
    (folder / "config.json").write_text(json.dumps(facts))
    weights = dict(tree_flatten(tiny.build("llama", vocab_size=3000).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    del weights
    async with running(tmp_path / "a", model=str(folder)) as engine:
        free = await ask(engine, "Hello!", sampling=WARM, max_tokens=60, ignore_end=True)
        bound = await ask(
            engine, "Hello!", grammar="start: /(.|\\n){200,}/", sampling=WARM, max_tokens=60
        )
    assert max(free.tokens) >= 2048 > max(bound.tokens)
