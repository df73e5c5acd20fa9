"""What a training run is made of: sizes, learning rates, stages."""

from dataclasses import dataclass, replace

from mlx_lm.models.llama import ModelArgs

from benchmarks.builtin_model.tokenizer import CONTEXT_LENGTH


@dataclass(frozen=True, slots=True)
class Stage:
    """`steps` batches of `batch` sequences of `length` tokens, whose positions reach to `span`."""

    length: int
    batch: int
    span: int
    steps: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the built-in model was made, but for a last 250 steps at long contexts."""

    vocabulary: int = 2048
    num_phrase_samples: int = 6000
    layers: int = 4
    rope_theta: float = 500_000.0
    muon_rate: float = 0.01
    adam_rate: float = 3e-3
    seed: int = 0
    stages: tuple[Stage, ...] = (
        Stage(128, 24, 128, 200),
        Stage(256, 12, 1024, 500),
        Stage(512, 6, 4096, 500),
        Stage(1024, 3, 4096, 150),
        Stage(2048, 2, 4096, 80),
    )

    @property
    def num_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def model_args(self) -> ModelArgs:
        return ModelArgs(
            model_type="llama",
            hidden_size=256,
            num_hidden_layers=self.layers,
            intermediate_size=640,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            rms_norm_eps=1e-5,
            vocab_size=self.vocabulary,
            rope_theta=self.rope_theta,
            tie_word_embeddings=True,
            max_position_embeddings=CONTEXT_LENGTH,
        )


FULL = Recipe()
QUICK = replace(
    FULL,
    vocabulary=320,
    num_phrase_samples=20,
    layers=2,
    stages=(Stage(32, 2, 32, 1), Stage(48, 2, 128, 1)),
)
"""Every stage of the making in a second or two; the model is worth nothing."""
