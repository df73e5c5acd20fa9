"""Steps of many sequences against plain mlx-lm on each by itself."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.nn.layers.linear import Linear
from mlx_lm.models.cache import make_prompt_cache

from agent_memory.kvcache.attention import Read
from agent_memory.kvcache.run import RunBuilder
from agent_memory.kvcache.sequence_kv import SequenceKV
from agent_memory.model.loader import LoadedModel
from agent_memory.model.runner import Job, Runner, rows_for_one_rounding
from tests.conftest import builtin_model
from tests.model import tiny

TOKENS = 60
READS: list[Read] = ["packed", "dense"]


class Texts:
    """Four texts, what plain mlx-lm makes of each, and how far each has come in our steps."""

    def __init__(self, runner: Runner, vocab: int) -> None:
        self.runner = runner
        self.texts = [[(i * (7 + s) + 3 * s) % vocab for i in range(TOKENS)] for s in range(4)]
        self.kvs = [SequenceKV(runner.spec) for _ in self.texts]
        model = runner.model
        self.plain = [model(mx.array([t]), cache=make_prompt_cache(model))[0] for t in self.texts]

    def restore(self, i: int) -> None:
        """Go on from a run of what there is."""
        kv = self.kvs[i]
        builder = RunBuilder(kv.spec, kv.length)
        builder.write(0, kv.length, kv.length, kv.copy_out(0, kv.length))
        self.kvs[i] = SequenceKV(kv.spec, builder.finish())

    def step(self, counts: dict[int, int], logits_of_all: bool = True) -> float:
        """The next tokens of each; -> how far the logits are from the plain ones."""
        starts = {i: self.kvs[i].length for i in counts}
        wanted = {i: n if logits_of_all else 1 for i, n in counts.items()}
        jobs = [
            Job(self.kvs[i], self.texts[i][starts[i] : starts[i] + n], wanted[i])
            for i, n in counts.items()
        ]
        logits = self.runner.forward(jobs)
        expected = [
            self.plain[i][starts[i] + n - wanted[i] : starts[i] + n] for i, n in counts.items()
        ]
        assert logits.shape[0] == sum(wanted.values())
        return float(mx.abs(logits - mx.concatenate(expected)).max())


@pytest.mark.parametrize("kind", ["llama", "qwen3", "openelm"])
def test_mixed_steps_with_joins_and_leaves_equal_plain(kind: str) -> None:
    texts = Texts(tiny.runner(tiny.build(kind)), tiny.VOCAB)
    far = [texts.step({0: 9}), texts.step({1: 17, 2: 4})]
    texts.restore(1)
    far += [
        texts.step({0: 1, 1: 1, 2: 5, 3: 12}),  # decode without and with a run, two chunks
        texts.step({0: 1, 1: 1, 2: 1, 3: 1}),
        texts.step({1: 1, 3: 20}),  # two have left
        texts.step({3: 1, 1: 7}, logits_of_all=False),
        texts.step({0: 1, 2: 1, 1: 2, 3: 2}),  # and are back
    ]
    assert max(far) < 1e-4


@pytest.mark.parametrize("min_rows", [2, 5, 64])
def test_padding_rows_change_nothing(min_rows: int) -> None:
    runner = tiny.runner(tiny.build("llama"))
    runner.min_rows = min_rows
    texts = Texts(runner, tiny.VOCAB)
    far = [texts.step({0: 9}), texts.step({0: 1, 1: 3}), texts.step({1: 1, 0: 1})]
    assert max(far) < 1e-4
    assert [kv.length for kv in texts.kvs] == [11, 4, 0, 0]


def test_reading_packed_and_dense_is_the_same(loaded: LoadedModel) -> None:
    out = []
    for read in READS:
        own = loaded.runner
        runner = Runner(own.model, own.spec, own._head, read, own.mode, own.min_rows)
        kv = SequenceKV(runner.spec)
        mx.eval(runner.forward([Job(kv, list(range(300, 380)))]))
        out.append(runner.forward([Job(kv, [7])]))
    assert float(mx.abs(out[0] - out[1]).max()) < 1e-3


def test_only_the_wanted_logits_are_computed() -> None:
    runner = tiny.runner(tiny.build("llama"))
    a, b = SequenceKV(runner.spec), SequenceKV(runner.spec)
    assert runner.forward([Job(a, [1, 2, 3], 2), Job(b, [4, 5], 0)]).shape == (2, tiny.VOCAB)
    assert runner.forward([Job(a, [1, 2, 3], 0), Job(b, [4, 5], 0)]).size == 1  # a marker


def test_where_no_logits_are_wanted_k_and_v_are_computed_all_the_same() -> None:
    """Evaluating the result leaves nothing of the step undone."""
    runner = tiny.runner(tiny.build("llama"))
    kvs = [SequenceKV(runner.spec), SequenceKV(runner.spec)]
    mx.eval(runner.forward([Job(kvs[0], [1, 2, 3], 0), Job(kvs[1], [4, 5], 0)]))
    mx.synchronize()
    before = mx.get_active_memory()
    mx.eval([tail.part() for kv in kvs for tail in kv.tails.values()])
    assert mx.get_active_memory() == before


def test_a_token_still_being_computed_can_be_the_next_rows() -> None:
    runner = tiny.runner(tiny.build("llama"))
    known, pending = SequenceKV(runner.spec), SequenceKV(runner.spec)
    first = [runner.forward([Job(kv, [5, 6, 7])]) for kv in (known, pending)]
    token = mx.argmax(first[1], axis=-1)
    out = runner.forward([Job(pending, token)])
    expected = runner.forward([Job(known, [int(mx.argmax(first[0]))])])
    np.testing.assert_array_equal(out, expected)


def test_decoding_with_a_step_behind_another_copies_no_tail() -> None:
    """Peak memory stays flat while a thousand tokens' KV grows by two hundred."""
    loaded = builtin_model(None)
    kv = SequenceKV(loaded.proven.spec, None, 1300)
    for _ in range(4):
        mx.eval(loaded.runner.forward([Job(kv, [9] * 256)]))
    side = kv.nbytes // len(kv.tails) // 2
    token = mx.array([7])
    for _ in range(3):  # buffers of a step are there
        token = mx.argmax(loaded.runner.forward([Job(kv, token)]), axis=-1)
        mx.eval(token)
    mx.synchronize()
    mx.reset_peak_memory()
    start = mx.get_active_memory()
    for _ in range(200):
        last, token = token, mx.argmax(loaded.runner.forward([Job(kv, token)]), axis=-1)
        mx.async_eval(token)
        last.item()
    mx.synchronize()
    assert kv.length == 1227
    assert mx.get_peak_memory() - start < side


def test_only_narrow_models_are_padded() -> None:
    spec = builtin_model(8).proven.spec
    narrow, wide = tiny.build("llama"), Linear(8, 2048)
    assert rows_for_one_rounding(wide, spec) == 1
    if mx.default_device().type == mx.DeviceType.cpu:
        assert rows_for_one_rounding(narrow, spec) == 1200 // 128 + 1
    assert rows_for_one_rounding(narrow, builtin_model(None).proven.spec) == 1
