"""What we rely on of mlx and mlx-lm: when a new version changes it, this says what."""

import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import base, cache, llama
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model, load_tokenizer
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from agent_memory import builtin
from agent_memory.kvcache.attention import ATTENTION, Dispatch
from tests.model import tiny


def parameters(function: Callable[..., object]) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.requirement("L-12")
def test_attention_is_called_through_one_name_with_these_parameters() -> None:
    expected = ["queries", "keys", "values", "cache", "scale", "mask", "sinks"]
    assert parameters(getattr(base, ATTENTION)) == expected
    assert hasattr(llama, ATTENTION)
    assert set(parameters(Dispatch.__call__)) == {"self", *expected}


def test_masks_are_asked_of_the_cache() -> None:
    assert parameters(base.create_attention_mask) == ["h", "cache", "window_size", "return_array"]

    class Cache:
        def make_mask(self, *args: object, **kwargs: object) -> object:
            return args, kwargs

    asked = base.create_attention_mask(mx.zeros((1, 5, 8)), Cache(), window_size=3)
    assert asked == ((5,), {"window_size": 3, "return_array": False})


def test_caches() -> None:
    model = tiny.build("llama")
    caches = make_prompt_cache(model)
    assert len(caches) == 3 and all(type(c) is KVCache for c in caches)
    assert parameters(QuantizedKVCache.__init__) == ["self", "group_size", "bits"]
    assert hasattr(cache, "RotatingKVCache")


def test_a_model_leaves_k_and_v_offset_and_mask_to_the_cache() -> None:
    seen: list[tuple[int, ...]] = []

    class Cache:
        offset = 3

        def make_mask(self, *_args: object, **_kwargs: object) -> str:
            return "causal"

        def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
            seen.extend([keys.shape, values.shape])
            return keys, values

    tiny.build("llama")(mx.array([[1, 2]]), cache=[Cache()] * 3)
    assert seen == [(1, 2, 2, 64)] * 6


def test_rope_takes_an_offset_for_each_row() -> None:
    x = mx.random.normal((3, 2, 1, 64), key=mx.random.key(0))

    def rope(x: mx.array, offset: int | mx.array) -> mx.array:
        return mx.fast.rope(x, 64, traditional=False, base=1e4, scale=1.0, offset=offset)

    together = rope(x, mx.array([5, 0, 700]))
    alone = [rope(x[i : i + 1], offset) for i, offset in enumerate((5, 0, 700))]
    assert float(mx.abs(together - mx.concatenate(alone)).max()) < 1e-6


def test_a_causal_mask_lets_the_last_query_see_the_last_key() -> None:
    q, k = (mx.random.normal((1, 1, n, 8), key=mx.random.key(n)) for n in (2, 5))
    out = mx.fast.scaled_dot_product_attention(q, k, k, scale=1.0, mask="causal")
    last = mx.softmax(q[..., 1:, :] @ k.swapaxes(-1, -2), axis=-1) @ k
    first = mx.softmax(q[..., :1, :] @ k[..., :4, :].swapaxes(-1, -2), axis=-1) @ k[..., :4, :]
    assert float(mx.abs(out - mx.concatenate([first, last], axis=2)).max()) < 1e-5


def test_the_numpy_view_of_evaluated_zeros_writes_through() -> None:
    array = mx.zeros((2, 3), dtype=mx.uint32)
    mx.eval(array)
    view = np.array(array, copy=False)
    assert view.flags.writeable
    view[1] = 7
    del view
    assert array.tolist() == [[0, 0, 0], [7, 7, 7]]
    assert (array[1:] + 1).tolist() == [[8, 8, 8]]


def test_bit_patterns_become_bfloat16_without_a_change() -> None:
    raw = mx.array([0x3F80, 0xC000, 0x7F80], dtype=mx.uint16)
    assert raw.view(mx.bfloat16).tolist() == [1.0, -2.0, float("inf")]
    assert raw.view(mx.bfloat16).view(mx.uint16).tolist() == raw.tolist()


def test_numpy_cannot_read_bfloat16() -> None:
    """Hence its bit patterns; where this begins to work, less is needed."""
    with pytest.raises(ValueError, match="bfloat16"):
        np.array(mx.zeros(3, dtype=mx.bfloat16))


def test_writing_a_slice_replaces_it_for_later_reads_only() -> None:
    array = mx.zeros((1, 1, 4, 2))
    before = array[..., :2, :]
    array[..., 1:2, :] = mx.ones((1, 1, 1, 2))
    assert before.sum().item() == 0
    assert array.sum().item() == 2


def test_quantizing_returns_packed_scales_and_biases() -> None:
    packed, scales, biases = mx.quantize(mx.ones((2, 64), dtype=mx.bfloat16), group_size=32, bits=4)
    assert (packed.dtype, packed.shape) == (mx.uint32, (2, 8))
    assert scales.dtype == biases.dtype == mx.bfloat16
    assert scales.shape == biases.shape == (2, 2)


def test_a_seed_of_64_bits_makes_a_draw_repeatable() -> None:
    logprobs = mx.zeros((1, 100)) - np.log(100)
    drawn = []
    for seed in (2**64 - 1, 5, 2**64 - 1, 5):
        mx.random.seed(seed)
        drawn.append(int(mx.random.categorical(logprobs)[0]))
    assert drawn[:2] == drawn[2:]
    assert drawn[0] != drawn[1]


def test_loading_gives_a_model_its_config_and_its_tokenizer() -> None:
    assert parameters(load_model)[:2] == ["model_path", "lazy"]
    model, config = load_model(builtin.PATH, lazy=True)
    assert isinstance(model, llama.Model) and config["hidden_size"] == 256
    wrapper = load_tokenizer(builtin.PATH, eos_token_ids=2)
    assert isinstance(wrapper, TokenizerWrapper)
    assert wrapper.has_chat_template and set(wrapper.eos_token_ids) == {2}
    assert isinstance(wrapper.backend_tokenizer, Tokenizer)
    assert callable(wrapper.backend_tokenizer.model._resize_cache)


def test_a_decode_stream_gives_text_when_it_is_whole() -> None:
    backend = Tokenizer.from_file(str(builtin.PATH / "tokenizer.json"))
    stream = DecodeStream(skip_special_tokens=True)
    pieces = [stream.step(backend, token) for token in backend.encode("né 🎉!").ids]
    assert None in pieces
    assert "".join(piece or "" for piece in pieces) == "né 🎉!"


def test_the_head_follows_the_trunk() -> None:
    """What is cut after the trunk is cut before the head."""
    model = tiny.build("llama")
    assert model["model"](mx.array([[1, 2, 3]])).shape == (1, 3, 128)
    assert model(mx.array([[1, 2, 3]])).shape == (1, 3, tiny.VOCAB)


@pytest.mark.requirement("L-19")
def test_what_one_thread_has_not_computed_another_cannot() -> None:
    """So a call of MLX in the wrong thread is an error, which every test of ours would see."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: mx.ones(3) + 1).result()
        with pytest.raises(RuntimeError, match="no Stream"):
            mx.eval(waiting)
        done = pool.submit(_computed).result()
    assert np.array(done).tolist() == [2, 2, 2]


def _computed() -> mx.array:
    array = mx.ones(3) + 1
    mx.eval(array)
    return array
