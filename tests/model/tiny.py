"""Tiny random models of mlx-lm's own classes, their weights spread enough to have opinions."""

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import (
    deepseek_v2,
    deepseek_v3,
    falcon_h1,
    gemma2,
    gemma3_text,
    gemma4_text,
    gpt_oss,
    jamba,
    lfm2,
    llama,
    openelm,
    qwen3,
    qwen3_5,
    qwen3_moe,
    qwen3_next,
)

from agent_memory import builtin
from agent_memory.kvcache import attention
from agent_memory.model import loader, probe
from agent_memory.model.probe import Proven
from agent_memory.model.runner import HeadCut, Runner

VOCAB = 512
COMMON: dict[str, object] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}
DELTA_NET: dict[str, object] = {
    "num_hidden_layers": 4,
    "full_attention_interval": 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "partial_rotary_factor": 0.5,
}
KINDS: dict[str, tuple[ModuleType, dict[str, object]]] = {
    "llama": (llama, {}),
    "qwen3": (qwen3, {}),
    # No trunk named `model`, and layers of different numbers of KV heads.
    "openelm": (
        openelm,
        {
            "num_transformer_layers": 3,
            "model_dim": 128,
            "ffn_dim_divisor": 8,
            "num_query_heads": [4, 8, 4],
            "num_kv_heads": [2, 4, 2],
            "ffn_multipliers": [2.0, 1.0, 2.0],
        },
    ),
    # Windows in some layers.
    "gemma3": (
        gemma3_text,
        {
            "model_type": "gemma3_text",
            "num_hidden_layers": 6,
            "sliding_window": 32,
            "sliding_window_pattern": 3,
            "query_pre_attn_scalar": 64,
        },
    ),
    # Windows, sinks, experts.
    "gpt_oss": (
        gpt_oss,
        {
            "num_hidden_layers": 4,
            "intermediate_size": 128,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 32,
            "rope_theta": 150000,
            "rope_scaling": None,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    # Windows, and layers that borrow the KV of others.
    "gemma4": (
        gemma4_text,
        {
            "model_type": "gemma4_text",
            "num_hidden_layers": 6,
            "global_head_dim": 64,
            "vocab_size_per_layer_input": VOCAB,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 16,
            "sliding_window": 32,
            "sliding_window_pattern": 3,
        },
    ),
    # K wider than V.
    "deepseek_v2": (
        deepseek_v2,
        {
            "moe_intermediate_size": 64,
            "num_key_value_heads": 4,
            "kv_lora_rank": 64,
            "q_lora_rank": None,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 64,
            "v_head_dim": 64,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "rope_scaling": {
                "type": "yarn",
                "factor": 1.0,
                "original_max_position_embeddings": 4096,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 0,
            },
        },
    ),
    # Experts.
    "qwen3_moe": (
        qwen3_moe,
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
        },
    ),
    # Gated delta nets, the last layers' attention; and the same with experts.
    "qwen3_5": (qwen3_5, {**DELTA_NET}),
    "qwen3_next": (
        qwen3_next,
        {
            **DELTA_NET,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 1,
            "shared_expert_intermediate_size": 64,
            "moe_intermediate_size": 64,
            "mlp_only_layers": [],
        },
    ),
    # Short convolutions, also behind the last attention.
    "lfm2": (
        lfm2,
        {
            "num_hidden_layers": 4,
            "norm_eps": 1e-5,
            "conv_bias": False,
            "conv_L_cache": 3,
            "block_dim": 128,
            "block_ff_dim": 256,
            "block_multiple_of": 64,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": False,
            "full_attn_idxs": [1, 2],
        },
    ),
    # Mamba and attention side by side in every layer, so two caches each.
    "falcon_h1": (
        falcon_h1,
        {
            "mamba_d_ssm": 128,
            "mamba_d_head": 32,
            "mamba_n_heads": 4,
            "mamba_d_state": 16,
            "attention_in_multiplier": 1.0,
        },
    ),
    "jamba": (
        jamba,
        {
            "num_hidden_layers": 4,
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "expert_layer_offset": 1,
            "expert_layer_period": 2,
            "mamba_d_conv": 4,
            "mamba_d_state": 16,
            "mamba_expand": 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    # Attention written out in the model itself.
    "gemma2": (gemma2, {}),
    # Latent attention.
    "deepseek_v3": (
        deepseek_v3,
        {
            "moe_intermediate_size": 64,
            "kv_lora_rank": 64,
            "q_lora_rank": 64,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 64,
            "v_head_dim": 64,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "topk_method": "noaux_tc",
            "norm_topk_prob": True,
        },
    ),
}


def config(kind: str, **over: object) -> dict[str, object]:
    return {"model_type": kind, **COMMON, **KINDS[kind][1], **over}


def build(kind: str, dtype: mx.Dtype = mx.float32, **over: object) -> Module:
    module, _ = KINDS[kind]
    args = module.ModelArgs.from_dict(config(kind, **over))
    mx.random.seed(0)  # vectors stay as the model begins with them
    model: Module = module.Model(args)
    return randomize(model, dtype)


def save(kind: str, folder: Path, chat_template: str | None = None, **over: Any) -> Path:
    """As a folder that can be served, with the built-in tokenizer."""
    shutil.copytree(builtin.PATH, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    facts = config(kind, vocab_size=2048, eos_token_id=2, pad_token_id=3, **over)
    (folder / "config.json").write_text(json.dumps(facts))
    if chat_template:
        told = json.loads((folder / "tokenizer_config.json").read_text())
        told["chat_template"] = chat_template
        (folder / "tokenizer_config.json").write_text(json.dumps(told))
    weights = dict(tree_flatten(build(kind, vocab_size=2048, **over).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


def randomize(model: Module, dtype: mx.Dtype = mx.float32) -> Module:
    """Every matrix from one normal distribution; the same in every process."""
    keys = iter(mx.random.split(mx.random.key(1), 1000))

    def weight(p: mx.array) -> mx.array:
        return mx.random.normal(p.shape, key=next(keys)) * 0.08 if p.ndim > 1 else p

    model.update(tree_map(weight, model.parameters()))
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    model.eval()
    return model


def proven(model: Module, bits: int | None = None, group_size: int = 32) -> tuple[Proven, HeadCut]:
    """As the loader does it."""
    attention.install(model)
    head = HeadCut(model)
    spec = probe.derive_spec(model, "tiny", bits, group_size)
    return loader.finish(probe.verify(model, head, spec)), head


def runner(model: Module, bits: int | None = None) -> Runner:
    found, head = proven(model, bits)
    return Runner(model, found.spec, head, found.read, found.mode)
