"""Matrix products in 8 bits, for inference: fp8 (e4m3) or int8 operands.

| products | scales of the weights | of the activations | applied |
|---|---|---|---|
| int8, and fp8 in the projector | one per output channel | one per row | after the product |
| fp8 in the encoder's layers | one per matrix | one per matrix | within the product |

Scales after the product leave only 8-bit operands within it. XLA hands a plain dot of float8_e4m3fn to
cuBLASLt with unit scales (its GEMM rewriter), and one of int8 with int32 sums to cuBLAS. The scale of a row
is one more reduction after what computes the row (LayerNorm, GELU), in the form that XLA fuses with it:
maximum, broadcast, divide.

The encoder's fp8 scales follow from bounds of the weights (`activation_bounds`). e4m3 rounds relative to each
number, so one scale for all loses nothing. cuBLASLt then applies scales, bias, GELU and residual within the
product and writes the MLP's hidden units in 8 bits: on an H100, XLA compiles no pass over memory other than
LayerNorm's and attention's.

Weights are stored as [output, input]: for fp8 the summed dimension must be the last of both operands, or XLA
transposes in a copy. Sizes that are no multiple of 16, rows too, are padded in a copy. so400m has no such
size, and the encoder pads its rows.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from crosslmm_jax.config import Precision
from crosslmm_jax.errors import ConfigError
from crosslmm_jax.model.params.tables import Params, Weight, input_dims, zeros
from crosslmm_jax.model.quantisation.activation_bounds import Bounds, activation_bounds

DTYPES = {"fp8": jnp.float8_e4m3fn, "int8": jnp.int8}
# The quantised matrices, of encoder and projector, and how many leading dimensions a product sums over.
INPUT_DIMS = {name: input_dims(name) for name in ("wq", "wk", "wv", "wo", "w1", "w2")}
# A row of smaller numbers counts as zeros: its scale and the inverse must be normal float32 numbers.
SMALLEST = 1e-30


class QuantisedRows(NamedTuple):
    """Activations in 8 bits: `values * scale`."""

    values: Array  # fp8 or int8[..., D]
    scale: Float[Array, "... 1"] | Float[Array, ""]  # per row, or for all


def largest(dtype: DTypeLike) -> float:
    """The largest quantised value of an 8-bit dtype: 448 in e4m3, 127 in int8 (symmetric)."""
    dtype = jnp.dtype(dtype)
    return float((jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo)(dtype).max)


def quantise(x: Array, dtype: DTypeLike, axes: int | Sequence[int]) -> tuple[Array, Array]:
    """`x` in 8 bits, with one float32 scale for all numbers along `axes`.

    Zeros stay zeros. A number that is not finite makes all that share its scale not finite, and no others.

    Returns:
      8-bit values of the shape of `x`, and scales with size 1 along `axes`: `x` is about `values * scale`.
    """
    x32 = x.astype(jnp.float32)
    scale = scale_for(jnp.max(jnp.abs(x32), axis=axes, keepdims=True), dtype)
    return quantise_at(scale, x32, dtype), scale


def scale_for(most: Float[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """The scale of 8-bit numbers that reach up to `most`."""
    return jnp.maximum(most, SMALLEST) / largest(dtype)


def quantise_at(scale: Float[Array, "..."], x: Float[Array, "..."], dtype: DTypeLike) -> Array:
    """`x / scale` in 8 bits. int8 has no NaN; the scale carries it."""
    scaled = x / scale
    return (jnp.round(scaled) if jnp.issubdtype(dtype, jnp.integer) else scaled).astype(dtype)


def power_of_two(bound: Float[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """The least power of two that scales numbers up to `bound` into the range of an 8-bit dtype.

    It is exact in bfloat16 too, and not finite where `bound` is not.
    """
    needed = jnp.maximum(bound.astype(jnp.float32), SMALLEST) / largest(dtype)
    mantissa, exponent = jnp.frexp(needed)
    return jnp.where(jnp.isfinite(needed), jnp.ldexp(1.0, exponent - (mantissa == 0.5)), needed)


def quantise_by(x: Array, scale: Float[Array, ""], dtype: DTypeLike) -> Array:
    """`x / scale` in fp8, clipped to its range; a conversion alone would make NaN of larger numbers.

    Computed in the dtype of `x`, in which a power of two loses nothing: in this form the GPU does it within
    the product that computes `x`.
    """
    most = jnp.asarray(largest(dtype), x.dtype)
    return jnp.clip(x / scale.astype(x.dtype), -most, most).astype(dtype)


def quantise_params(params: Params, precision: Precision) -> Params:
    """Parameters of `init_params` as a model with `ModelConfig.visual_matmul` = `precision` reads them.

    For each matrix NAME of encoder and projector:

    - NAME: 8-bit values with the summed dimensions last.
    - NAME_scale: a float32 scale per output channel; with "fp8", one per matrix of an encoder layer.
    - NAME_input_scale: with "fp8" in the encoder, the scale of its input. wk and wv have the input of wq.

    All other parameters stay as they are, and with "compute" everything does. May be traced.

    Args:
      params: some or all parts, layers stacked on axis 0.
      precision: precision of the products.
    """
    if precision == "compute":
        return dict(params)
    quantised = dict(params)
    per_channel = functools.partial(_quantise_per_channel, precision=precision)
    if "encoder" in params:
        quantise_layer = _quantise_layer if precision == "fp8" else per_channel
        layers = jax.vmap(quantise_layer)(params["encoder"]["layers"])
        quantised["encoder"] = {**params["encoder"], "layers": layers}
    if "projector" in params:
        quantised["projector"] = per_channel(params["projector"])
    return quantised


def _quantise_per_channel(weights: Mapping[str, Array], precision: Precision) -> dict[str, Array]:
    quantised = dict(weights)
    for name in [name for name in INPUT_DIMS if name in weights]:
        matrix, summed = _summed_last(weights, name)
        quantised[name], scale = quantise(matrix, DTYPES[precision], summed)
        quantised[f"{name}_scale"] = jnp.squeeze(scale, summed)
    return quantised


def _quantise_layer(weights: Mapping[str, Array]) -> dict[str, Array]:
    quantised, dtype = dict(weights), DTYPES["fp8"]
    for name in INPUT_DIMS:
        matrix, _ = _summed_last(weights, name)
        matrix = matrix.astype(jnp.float32)
        scale = power_of_two(jnp.max(jnp.abs(matrix)), dtype)
        quantised[name], quantised[f"{name}_scale"] = quantise_by(matrix, scale, dtype), scale
    for name, bound in activation_bounds(weights)._asdict().items():
        quantised[f"{name}_input_scale"] = power_of_two(bound, dtype)
    return quantised


def _summed_last(weights: Mapping[str, Array], name: str) -> tuple[Array, tuple[int, ...]]:
    summed = INPUT_DIMS[name]
    last = tuple(range(-summed, 0))
    return jnp.moveaxis(weights[name], range(summed), last), last


def quantised_table(
    table: Mapping[str, Weight], precision: Precision, *, bounded: bool = False
) -> dict[str, Weight]:
    """The table of one layer's weights as `quantise_params` returns them; initial values are meaningless.

    Args:
      table: of an encoder layer (`bounded`) or the projector.
      precision: precision of the products.
      bounded: whether `activation_bounds` bounds the inputs of the matrices.
    """
    quantised, one_scale = dict(table), bounded and precision == "fp8"
    if precision == "compute":
        return quantised
    for name in [name for name in INPUT_DIMS if name in table]:
        shape, axes, summed = table[name].shape, table[name].axes, INPUT_DIMS[name]
        quantised[name] = Weight(shape[summed:] + shape[:summed], axes[summed:] + axes[:summed], zeros)
        outputs = slice(summed, summed if one_scale else None)
        quantised[f"{name}_scale"] = Weight(shape[outputs], axes[outputs], zeros)
    if one_scale:
        quantised |= {f"{name}_input_scale": Weight((), (), zeros) for name in Bounds._fields}
    return quantised


def operand(x: Float[Array, "... d"], weights: Mapping[str, Array], matrix: str) -> Array | QuantisedRows:
    """`x` as the operand of products with `weights[matrix]`: quantised if the matrix is."""
    dtype, scale = weights[matrix].dtype, weights.get(f"{matrix}_input_scale")
    if dtype.itemsize > 1:
        return x
    return QuantisedRows(
        *(quantise(x, dtype, -1) if scale is None else (quantise_by(x, scale, dtype), scale))
    )


def linear(
    x: Array | QuantisedRows, weights: Mapping[str, Array], matrix: str, bias: str
) -> Float[Array, "... m"]:
    """`x @ matrix + bias`, all outputs of the matrix in one dimension.

    Args:
      x: `operand` of float[..., D].
      weights: weights of a layer.
      matrix: name of a matrix with D inputs, in any number of dimensions.
      bias: name of its bias, whose dtype is that of the result.

    Raises:
      ConfigError: the gradient of a quantised product is taken.
    """
    b = weights[bias].reshape(-1)
    if not isinstance(x, QuantisedRows):
        # Two-dimensional matrices: a GPU then computes bias, GELU and residual within the products.
        return x @ weights[matrix].reshape(x.shape[-1], -1) + b
    weight, scale = weights[matrix], weights[f"{matrix}_scale"]
    if x.scale.ndim == 0:
        return scaled_product(x, weight, scale, dtype=b.dtype) + b
    product = quantised_product(x, weight, scale, dtype=b.dtype)
    return (product + b.astype(jnp.float32)).astype(b.dtype)


def scaled_product(
    rows: QuantisedRows, weight: Array, weight_scale: Float[Array, ""], *, dtype: DTypeLike
) -> Float[Array, "... m"]:
    """`dtype`[..., M] of fp8 rows and a matrix [output..., input...], each with one scale, a power of two.

    Written as a product of dequantised operands: XLA's GEMM rewriter takes this form for fp8, and any other
    device can compute it as it is.
    """
    rows, weight, weight_scale = _without_gradient((rows, weight, weight_scale))
    matrix = weight.reshape(-1, rows.values.shape[-1])
    x = rows.values.astype(dtype) * rows.scale.astype(dtype)
    dimensions = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, matrix.astype(dtype) * weight_scale.astype(dtype), dimensions)


def quantised_product(
    rows: QuantisedRows, weight: Array, weight_scale: Float[Array, "..."], *, dtype: DTypeLike
) -> Float[Array, "... m"]:
    """float32[..., M] of 8-bit rows and an 8-bit matrix [output..., input...], with both scales applied.

    Sums are int32 for int8. For fp8 they are float32, written as `dtype` and then scaled: scaling reads
    little else than what the product writes. On Hopper, XLA's default precision lets tensor cores keep fewer
    bits of a running sum (cuBLASLt's fast accumulation). `precision="highest"` does not, and runs slower.
    """
    rows, weight, weight_scale = _without_gradient((rows, weight, weight_scale))
    scale = weight_scale.reshape(-1)
    matrix = weight.reshape(scale.size, math.prod(weight.shape) // scale.size)
    sums = jnp.int32 if weight.dtype == jnp.int8 else dtype
    dimensions = (((rows.values.ndim - 1,), (1,)), ((), ()))
    product = jax.lax.dot_general(rows.values, matrix, dimensions, preferred_element_type=sums)
    return product.astype(jnp.float32) * (rows.scale * scale)


Operands = tuple[QuantisedRows, Array, Array]  # rows, matrix and the scale of the matrix


@jax.custom_jvp
def _without_gradient(operands: Operands) -> Operands:
    return operands


@_without_gradient.defjvp
def _refuse(primals: object, tangents: object) -> NoReturn:
    raise ConfigError(
        "ModelConfig.visual_matmul is 'fp8' or 'int8'; it must be 'compute' where gradients are taken, since"
        " rounding to 8 bits has no gradient"
    )
