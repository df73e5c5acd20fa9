"""How much memory a loaded model takes besides KV, and how much there is on this machine.

Measured where it can be, and counted where not.  Engine thread only.
"""

import gc
import os

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten

from agent_memory import heap
from agent_memory.block import BLOCK_TOKENS, in_blocks
from agent_memory.kv_spec import NUMPY, KVSpec, LayerGroup, payload_bytes
from agent_memory.kvcache.sequence_kv import SequenceKV
from agent_memory.model.runner import Job, Runner

STEPS_AT_ONCE = 2
"""A step is launched while the one before it is computed."""
LAYERS_AT_ONCE = 2
STATES_HELD = 4
"""Copies of a sequence's recurrent states: in its run, its own, and two that are marked."""
MOST_CACHE_BYTES = 2 << 30


def weights_bytes(model: Module) -> int:
    return sum(array.nbytes for array in dict(tree_flatten(model.parameters())).values())


def step_bytes(runner: Runner, kv: SequenceKV, num_rows: int) -> int:
    """What one step of `num_rows` more rows of a prompt works with beside weights and KV."""
    mx.eval(kv.states)
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory() - kv.nbytes
    mx.eval(runner.forward([Job(kv, [0] * num_rows)]))
    return max(0, mx.get_peak_memory() - before - kv.nbytes)


def context_bytes(spec: KVSpec) -> int:
    """What a chunk of a prompt needs per token before it, at least: the K and V of a layer, made
    dense.  Where no kernel does all of attention at once, or a model works on K and V itself, it is
    more: the scores of all its rows."""

    def dense(group: LayerGroup) -> int:
        dims = sum(form.dim * NUMPY[form.dtype].itemsize for form in (group.k, group.v))
        return group.kv_heads * dims

    return LAYERS_AT_ONCE * max(dense(group) for group in spec.groups)


def token_bytes(spec: KVSpec) -> int:
    """Of KV per token, in the layers that keep all of them."""
    return sum(payload_bytes((group,), 1) for group in spec.groups if group.window is None)


def sequence_bytes(spec: KVSpec) -> int:
    """Of a sequence however long it is: of KV in layers with a window, in its run and in its tail
    with room to move; of states in its run, its own and some that are marked."""
    return STATES_HELD * spec.state_bytes + sum(
        2 * payload_bytes((group,), in_blocks(group.window) + 2 * BLOCK_TOKENS)
        for group in spec.groups
        if group.window is not None
    )


def machine_bytes() -> int:
    """What a server may use here: on a GPU what the device recommends or has, else three quarters
    of the machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4
    if mx.default_device().type == mx.DeviceType.cpu:
        return memory
    info = mx.device_info()
    for fact in ("max_recommended_working_set_size", "total_memory"):
        if isinstance(info.get(fact), int):
            return int(info[fact])
    return memory


def limit_cache(budget_bytes: int) -> int:
    """How much is kept of what was freed, from now on: by MLX, or on a CPU by the heap."""
    limit = min(budget_bytes // 16, MOST_CACHE_BYTES)
    if mx.default_device().type == mx.DeviceType.cpu:
        return heap.keep(limit)
    mx.set_cache_limit(limit)
    return limit


def give_back() -> dict[str, int]:
    """What nobody refers to any more goes back to the system; -> what is left."""
    mx.synchronize()
    gc.collect()
    gc.collect()
    mx.clear_cache()
    heap.give_back()
    return {
        "active_bytes": mx.get_active_memory(),
        "cache_bytes": mx.get_cache_memory(),
        "peak_bytes": mx.get_peak_memory(),
    }
