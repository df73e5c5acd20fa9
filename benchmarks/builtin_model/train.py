"""The training loop: Muon for the layers' matrices, AdamW for the rest, float32, on the CPU."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.nn.utils import value_and_grad
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.llama import Model

from benchmarks.builtin_model.forward import loss
from benchmarks.builtin_model.recipe import Recipe
from benchmarks.builtin_model.samples import Sampler
from benchmarks.builtin_model.seed_init import seed_weights

WARM_UP_STEPS = 40
REPORT_STEPS = 25

Batch = tuple[mx.array, mx.array, mx.array]
"""ids, positions and weights: see samples.py."""
Step = Callable[[mx.array, mx.array, mx.array], float]


def new_model(recipe: Recipe) -> Model:
    """What residual branches write starts small."""
    mx.random.seed(recipe.seed)
    model = Model(recipe.model_args())
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight *= 0.1
        layer.mlp.down_proj.weight *= 0.1
    seed_weights(model, recipe.seed)
    mx.eval(model.parameters())
    return model


def train(model: Model, sampler: Sampler, recipe: Recipe, report: Callable[[str], None]) -> float:
    """Returns the mean loss of the last steps."""
    step, started = training_step(model, recipe), time.monotonic()
    losses: list[float] = []
    for number, batch in enumerate(_batches(sampler, recipe), 1):
        losses.append(step(*batch))
        if number % REPORT_STEPS == 0 or number == recipe.num_steps:
            mean = sum(losses[-REPORT_STEPS:]) / len(losses[-REPORT_STEPS:])
            passed = time.monotonic() - started
            report(f"step {number} of {recipe.num_steps}, loss {mean:.3f}, {passed:.0f} s")
    return mean


def training_step(model: Model, recipe: Recipe) -> Step:
    muon = optim.Muon(_rate(recipe.muon_rate, recipe.num_steps), weight_decay=0.0)
    adam = optim.AdamW(
        _rate(recipe.adam_rate, recipe.num_steps), betas=[0.9, 0.98], weight_decay=0.01
    )
    optimizer = optim.MultiOptimizer(
        [muon, adam], [lambda name, weight: "layers" in name and weight.ndim == 2]
    )
    loss_and_gradient = value_and_grad(model, loss)

    def step(ids: mx.array, positions: mx.array, weights: mx.array) -> float:
        value, gradient = loss_and_gradient(model, ids, positions, weights)
        optimizer.update(model, _clipped(gradient))
        mx.eval(value, model.state, optimizer.state)
        return float(value)

    return step


def _clipped(gradient: dict[str, Any]) -> Any:
    """Scaled to a norm of at most 1."""
    squares = [mx.square(g).sum() for g in dict(tree_flatten(gradient)).values()]
    scale = mx.minimum(1.0, mx.rsqrt(mx.stack(squares).sum() + 1e-12))
    return tree_map(lambda g: g * scale, gradient)


def _rate(base: float, num_steps: int) -> Callable[[mx.array], mx.array]:
    """Up over the first steps, level, then down to a twentieth over the last 60 %."""

    def rate(step: mx.array) -> mx.array:
        up = mx.minimum((step + 1) / WARM_UP_STEPS, 1.0)
        down = mx.clip((num_steps - step) / (0.6 * num_steps), 0.05, 1.0)
        product: mx.array = base * up * down
        return product

    return rate


def _batches(sampler: Sampler, recipe: Recipe) -> Iterator[Batch]:
    for stage in recipe.stages:
        for _ in range(stage.steps):
            ids, positions, weights = sampler.batch(stage.batch, stage.length, stage.span)
            yield mx.array(ids), mx.array(positions), mx.array(weights)
