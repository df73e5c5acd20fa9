"""K and V as they are stored: quantized once, or dense in the model's type.

A packed tensor is what `TensorFormat.tensors` lists: (packed, scales, biases), or (dense,), each of
shape [batch, heads, tokens, width]; (dense,) is read as such whatever the format says.  Nothing
else in the package looks inside one.  Quantizing is
affine, in groups along the head dimension (Jacob et al. 2018, as in `mx.quantize`), so tokens never
mix: packing a concatenation equals concatenating the packed, bit for bit.  Engine thread only.
"""

import mlx.core as mx
import numpy as np

from agent_memory.kv_spec import NUMPY, DType, TensorFormat

Packed = tuple[mx.array, ...]

DTYPES: dict[DType, mx.Dtype] = {
    "U32": mx.uint32,
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
}


RAW: dict[str, mx.Dtype] = {
    "U32": mx.uint32,
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.uint16,  # filled as bit patterns, viewed as bfloat16 when done
}


def dtype_name(dtype: mx.Dtype) -> DType:
    return next(name for name, known in DTYPES.items() if known == dtype)


def pack(x: mx.array, form: TensorFormat) -> Packed:
    if form.bits is None:
        return (x,)
    return tuple(mx.quantize(x, group_size=form.group_size, bits=form.bits))


def dense(packed: Packed, form: TensorFormat) -> mx.array:
    if len(packed) == 1:
        return packed[0]
    w, scales, biases = packed
    return mx.dequantize(w, scales, biases, group_size=form.group_size, bits=form.bits)


def scores(q: mx.array, keys: Packed, form: TensorFormat) -> mx.array:
    """q [.., m, dim] against keys [.., tokens, dim] -> [.., m, tokens]."""
    if len(keys) == 1:
        return q @ keys[0].swapaxes(-1, -2)
    w, scales, biases = keys
    return mx.quantized_matmul(
        q, w, scales, biases, transpose=True, group_size=form.group_size, bits=form.bits
    )


def weighted(p: mx.array, values: Packed, form: TensorFormat) -> mx.array:
    """p [.., m, tokens] times values [.., tokens, dim] -> [.., m, dim]."""
    if len(values) == 1:
        return p @ values[0]
    w, scales, biases = values
    return mx.quantized_matmul(
        p, w, scales, biases, transpose=False, group_size=form.group_size, bits=form.bits
    )


def choose_format(dim: int, dtype: mx.Dtype, bits: int | None, group_size: int) -> TensorFormat:
    """The wanted bits in the largest group up to `group_size` that divides dim, else dense."""
    for group in (128, 64, 32):
        if bits is not None and group <= group_size and dim % group == 0:
            return TensorFormat(dim, dtype_name(dtype), bits, group)
    return TensorFormat(dim, dtype_name(dtype))


def typed(array: mx.array, dtype: DType) -> mx.array:
    """One that was filled as RAW."""
    return array if array.dtype == DTYPES[dtype] else array.view(DTYPES[dtype])


def host(array: mx.array) -> np.ndarray:
    """An evaluated array's bytes as numpy sees them; valid while the array lives."""
    raw = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    view: np.ndarray = np.array(raw, copy=False)
    assert view.dtype in NUMPY.values()
    return view
