"""exp, softmax, SwiGLU and cross entropy for training on a CPU.

MLX's exp calls the scalar library function for each number there, about ten times slower than
arithmetic, which is vectorised.  So exp is a polynomial here, and what contains it has its gradient
written out.  Relative error about 2e-7.
"""

import mlx.core as mx

_LOG2_E = 1.4426950408889634
_ROUND = (
    12582912.0  # 1.5 * 2**23: adding it rounds a float32 to a whole number, kept in its low bits
)
_TWO_TO_THE = (
    0.00015403530393381608,
    0.0013333558146428443,
    0.009618129107628477,
    0.05550410866482158,
    0.2402265069591007,
    0.6931471805599453,
    1.0,
)


def exp(x: mx.array) -> mx.array:
    """For x up to 88; below -86 as at -86.  2**whole by its exponent bits, 2**rest by series."""
    power = mx.maximum(x, -86.0) * _LOG2_E
    rounded = power + _ROUND
    rest = power - (rounded - _ROUND)
    series = mx.full(rest.shape, _TWO_TO_THE[0])
    for coefficient in _TWO_TO_THE[1:]:
        series = series * rest + coefficient
    return series * mx.view((mx.view(rounded, mx.int32) + 127) << 23, mx.float32)


def sigmoid(x: mx.array) -> mx.array:
    return 1.0 / (1.0 + exp(mx.minimum(-x, 80.0)))


@mx.custom_function
def softmax(scores: mx.array) -> mx.array:
    """Over the last axis."""
    e = exp(scores - mx.max(scores, axis=-1, keepdims=True))
    return e * (1.0 / mx.sum(e, axis=-1, keepdims=True))


@softmax.vjp
def _softmax_vjp(_scores: mx.array, cotangent: mx.array, out: mx.array) -> mx.array:
    return out * (cotangent - mx.sum(cotangent * out, axis=-1, keepdims=True))


@mx.custom_function
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * up * sigmoid(gate)


@swiglu.vjp
def _swiglu_vjp(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, _out: mx.array
) -> tuple[mx.array, mx.array]:
    gate, up = primals
    s = sigmoid(gate)
    swish = gate * s
    return cotangent * up * (s + swish * (1.0 - s)), cotangent * swish


@mx.custom_function
def cross_entropy(
    logits: mx.array, targets: mx.array, weights: mx.array
) -> tuple[mx.array, mx.array]:
    """(weighted sum over all positions, probabilities) of logits [B, T, V], targets [B, T]."""
    highest = mx.max(logits, axis=-1, keepdims=True)
    e = exp(logits - highest)
    total = mx.sum(e, axis=-1, keepdims=True)
    wanted = mx.take_along_axis(logits, targets[..., None], -1)
    losses = (mx.log(total) + highest - wanted)[..., 0]
    return (losses * weights).sum(), e * (1.0 / total)


@cross_entropy.vjp
def _cross_entropy_vjp(
    primals: tuple[mx.array, mx.array, mx.array],
    cotangents: tuple[mx.array, mx.array],
    outputs: tuple[mx.array, mx.array],
) -> tuple[mx.array, mx.array, mx.array]:
    """Probabilities minus one at the target; the weights are given and get no gradient."""
    _, targets, weights = primals
    at, probabilities = targets[..., None], outputs[1]
    less = mx.take_along_axis(probabilities, at, -1) - 1.0
    gradient = mx.put_along_axis(probabilities, at, less, -1)
    scaled = gradient * (weights[..., None] * cotangents[0])
    return scaled, mx.zeros_like(targets), mx.zeros_like(weights)
