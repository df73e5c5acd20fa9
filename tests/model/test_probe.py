"""Which models are taken, which are refused, and whether the reason can be read."""

import mlx.core as mx
import pytest
from mlx_lm.models import llama
from mlx_lm.models.cache import ChunkedKVCache, KVCache

from agent_memory.errors import ModelRefused
from agent_memory.kv_spec import TensorFormat
from tests.model import tiny


@pytest.mark.parametrize("kind", ["llama", "qwen3", "openelm"])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_ordinary_attention_is_taken(kind: str, bits: int | None) -> None:
    found, head = tiny.proven(tiny.build(kind), bits)
    assert found.worst_difference < 1e-3
    assert found.vocab_size == tiny.VOCAB
    assert found.read == "packed"
    assert head.works == (kind != "openelm")
    for group in found.spec.groups:
        group_size = 0 if bits is None else 32
        assert group.k == group.v == TensorFormat(64, "F32", bits, group_size)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_half_precision_is_taken(dtype: mx.Dtype) -> None:
    found, _ = tiny.proven(tiny.build("llama", dtype), 8)
    assert found.spec.groups[0].k.dtype == ("F16" if dtype == mx.float16 else "BF16")


def test_layers_of_one_shape_form_a_group() -> None:
    found, _ = tiny.proven(tiny.build("openelm"))
    assert [(g.layers, g.kv_heads) for g in found.spec.groups] == [((0, 2), 2), ((1,), 4)]


def test_a_head_dim_that_no_group_divides_stays_dense() -> None:
    found, _ = tiny.proven(tiny.build("llama", head_dim=48), bits=8)
    assert found.spec.groups[0].k == TensorFormat(48, "F32")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("gemma2", "logits differ by"),
    ],
)
def test_what_cannot_be_proven_is_refused_with_the_reason(kind: str, reason: str) -> None:
    with pytest.raises(ModelRefused, match=reason) as refused:
        tiny.proven(tiny.build(kind))
    assert "Choose" in str(refused.value)


class Chunked(llama.Model):
    """Its layers see only the tokens of a chunk, like those of llama4."""

    def make_cache(self) -> list[ChunkedKVCache]:
        return [ChunkedKVCache(64) for _ in self.layers]


def test_another_kind_of_cache_is_refused_by_its_name() -> None:
    model = Chunked(llama.ModelArgs.from_dict({"model_type": "llama", **tiny.COMMON}))
    with pytest.raises(ModelRefused, match="ChunkedKVCache"):
        tiny.proven(tiny.randomize(model))


class Windowed(llama.Model):
    """Its mask has a window, of which its caches say nothing; the self-test is shorter than it."""

    def make_cache(self) -> list[KVCache]:
        return [KVCache() for _ in self.layers]


def test_a_window_without_a_cache_of_its_own_is_refused() -> None:
    config = {"model_type": "llama", **tiny.COMMON, "sliding_window": 1000}
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = Windowed(llama.ModelArgs.from_dict({**config, "layer_types": kinds}))
    with pytest.raises(ModelRefused, match="last 1000 tokens"):
        tiny.proven(tiny.randomize(model))


class Scaled(llama.Model):
    """Its logits depend on how many tokens come together, as no honest model's do."""

    def __call__(
        self,
        inputs: mx.array,
        cache: object = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        out: mx.array = super().__call__(inputs, cache, input_embeddings)
        return out * (1 + 0.1 * inputs.shape[1])


def test_numbers_that_are_not_the_models_own_are_refused() -> None:
    model = Scaled(llama.ModelArgs.from_dict({"model_type": "llama", **tiny.COMMON}))
    with pytest.raises(ModelRefused, match="logits differ by"):
        tiny.proven(tiny.randomize(model))
