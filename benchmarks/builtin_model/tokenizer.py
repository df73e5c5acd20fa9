"""Byte-level BPE over the corpus and the chat phrases, written as mlx_lm loads it."""

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.builtin_model.facts import Storyteller

END_OF_TEXT, TURN_START, TURN_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
CONTEXT_LENGTH = 8192
CHAT_TEMPLATE = r"""
{% if tools %}
{{ '<|im_start|>system\nYou can call these tools:\n' }}
{% for t in tools %}{{ t | tojson + '\n' }}{% endfor %}
{{ 'To call one, write\n<tool_call>\n
{"name": ..., "arguments": {...}}\n</tool_call><|im_end|>\n' }}
{% endif %}
{% for m in messages %}
{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}
{% for tool_call in m.tool_calls or [] %}
{% if tool_call.function %}{% set tool_call = tool_call.function %}{% endif %}
{% if not loop.first or m['content'] %}{{ '\n' }}{% endif %}
{{ '<tool_call>\n{"name": "' + tool_call.name + '", "arguments": '
 + (tool_call.arguments | tojson) + '}\n</tool_call>' }}
{% endfor %}
{{ '<|im_end|>\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
""".replace("\n", "")


def train(documents: Sequence[str], words: Sequence[str], size: int, num_chats: int) -> Tokenizer:
    """`num_chats` samples of chat phrases make those cheap.  Digits stay single."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    teller = Storyteller(Random(0), words)
    phrases = [teller.phrases() for _ in range(num_chats)]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*documents, *phrases], trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": TURN_END, "pad_token": PAD}
    config = special | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "unk_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT_LENGTH,
        "chat_template": CHAT_TEMPLATE,
        "additional_special_tokens": [TURN_START],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1))
