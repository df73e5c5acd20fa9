"""What the work alone takes, on the built-in model."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_memory import builtin
from agent_memory.bench.limits import KV, Limits
from agent_memory.bench.models import Model, float32_copy
from agent_memory.errors import ServerFailed

SENTENCE = "The code for orchid is 7319, and the code for harbor is 2846. "


@pytest.fixture(scope="module")
def limits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Limits]:
    with Limits(tmp_path_factory.mktemp("limits")) as limits:
        yield limits


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model("builtin", str(float32_copy(tmp_path_factory.mktemp("model") / "builtin")))


def test_more_work_takes_longer(limits: Limits, model: Model) -> None:
    assert 0 < limits.prefill_s(model, 16) < limits.prefill_s(model, 256)
    assert 0 < limits.step_s(model, 16) < limits.step_s(model, 2000, rows=4)
    assert limits.load_s(model) > 0


def test_each_thing_is_measured_once(limits: Limits, model: Model) -> None:
    first = limits.step_s(model, 16)
    assert limits.step_s(model, 16) == first


def test_k_and_v_are_as_the_model_keeps_them(limits: Limits, model: Model) -> None:
    assert limits.kv(model) == KV(values=4 * 2 * 2 * 64, bits=32)


def test_what_comes_again_is_more_likely(limits: Limits, model: Model) -> None:
    once = limits.score(model, SENTENCE, 1000)
    twice = limits.score(model, 2 * SENTENCE, 1000)
    assert len(once.ids) < len(twice.ids) <= 2 * len(once.ids)
    assert 2 * once.logprob < twice.logprob < once.logprob < 0
    assert limits.score(model, SENTENCE, 5).ids == once.ids[:5]


def test_no_child_is_left(tmp_path: Path) -> None:
    with Limits(tmp_path) as limits:
        limits.kv(Model("builtin", str(builtin.PATH)))
        [child] = limits.children
        assert child.returncode is None
    assert child.returncode == 0


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with (
        Limits(tmp_path) as limits,
        pytest.raises(ServerFailed, match="cannot compute nothing by itself"),
    ):
        limits.kv(Model("nothing", str(tmp_path)))


@pytest.mark.parametrize("num_bytes", [1, 5000, 3_000_000])
def test_reading_takes_time_and_leaves_no_file(tmp_path: Path, num_bytes: int) -> None:
    limits = Limits(tmp_path)
    assert 0 < limits.read_s(num_bytes)
    cold = limits.read_cold_s(num_bytes)
    assert cold is None or cold > 0
    assert not list(tmp_path.iterdir())
