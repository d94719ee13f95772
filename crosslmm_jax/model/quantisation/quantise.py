"""Matrix products in 8 bits, for inference: fp8 (e4m3) or int8 operands.

int8, and fp8 in the projector: one scale a row of activations and one an output channel of weights, applied
behind the product, so that the product itself reads nothing but 8-bit operands. XLA hands a plain dot of
float8_e4m3fn to cuBLASLt with unit scales (its GEMM rewriter), and one of int8 with int32 sums to cuBLAS. The
scale of a row is one more reduction behind what makes the row (LayerNorm, GELU), in the form that XLA fuses
with it: maximum, broadcast, divide.

fp8 in the encoder's layers: one scale a matrix and one for all activations that a matrix reads, from bounds
that follow from the weights (`activation_bounds`). e4m3 rounds relative to each number, so nothing is lost by
that; and cuBLASLt then applies scales, bias, GELU and residual within the product and writes the MLP's hidden
units in 8 bits: on an H100, XLA compiles no pass over memory beside LayerNorm's and attention's.

For fp8 the summed dimension must be the last of both, or XLA transposes in a copy: so weights are stored as
[output, input]. Sizes that are no multiple of 16, rows too, are padded in a copy (so400m has none; the
encoder sees to its rows).
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from crosslmm_jax.config import Precision
from crosslmm_jax.errors import ConfigError
from crosslmm_jax.model.params.tables import Weight, zeros
from crosslmm_jax.model.quantisation.activation_bounds import Bounds, activation_bounds

DTYPES = {"fp8": jnp.float8_e4m3fn, "int8": jnp.int8}
# Leading dimensions of each matrix that a product sums over; the encoder's and the projector's are quantised.
INPUT_DIMS = {"wq": 1, "wk": 1, "wv": 1, "wo": 2, "w1": 1, "w2": 1}
# Below this a row counts as zeros: its scale must be a normal float32, and so must its inverse.
SMALLEST = 1e-30


class Rows(NamedTuple):
    """Activations in 8 bits: `values * scale`."""

    values: Array  # fp8 or int8[..., D]
    scale: Float[Array, "... 1"] | Float[Array, ""]  # a row, or for all


def largest(dtype: Any) -> float:
    """The largest number that an 8-bit dtype is used for: 448 in e4m3, 127 in int8 (symmetric)."""
    dtype = jnp.dtype(dtype)
    return float((jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo)(dtype).max)


def quantise(x: Array, dtype: Any, axes: int | Sequence[int]) -> tuple[Array, Array]:
    """`x` in 8 bits, with one float32 scale for all that lies along `axes`.

    Zeros stay zeros. What is not finite makes all that shares its scale not finite, and nothing else.

    Returns:
      8-bit values of the shape of `x`, and scales with size 1 along `axes`: `x` is about `values * scale`.
    """
    x32 = x.astype(jnp.float32)
    most = jnp.max(jnp.abs(x32), axis=axes, keepdims=True)
    scale = jnp.maximum(most, SMALLEST) / largest(dtype)
    scaled = x32 / scale
    # int8 knows no NaN; the scale carries it.
    return (jnp.round(scaled) if jnp.issubdtype(dtype, jnp.integer) else scaled).astype(dtype), scale


def power_of_two(bound: Float[Array, "..."], dtype: Any) -> Float[Array, "..."]:
    """The least power of two that brings all up to `bound` into the range of an 8-bit dtype.

    Exact in bfloat16 too. Not finite where `bound` is not.
    """
    needed = jnp.maximum(bound.astype(jnp.float32), SMALLEST) / largest(dtype)
    mantissa, exponent = jnp.frexp(needed)
    return jnp.where(jnp.isfinite(needed), jnp.ldexp(1.0, exponent - (mantissa == 0.5)), needed)


def quantise_by(x: Array, scale: Float[Array, ""], dtype: Any) -> Array:
    """`x / scale` in fp8, with what lies beyond its range at the range's end: a conversion makes NaN of it.

    In the dtype of `x`, where a power of two loses nothing: in this form the product that made `x` does it.
    """
    most = jnp.asarray(largest(dtype), x.dtype)
    return jnp.clip(x / scale.astype(x.dtype), -most, most).astype(dtype)


def quantise_params(params: Mapping[str, Any], precision: Precision) -> dict[str, Any]:
    """Parameters of `init_params` as a model with `ModelConfig.visual_matmul` = `precision` reads them.

    Each matrix of encoder and projector becomes 8-bit values with its summed dimensions last, and under its
    name with "_scale" a float32 scale an output channel; but with "fp8" one for each matrix of an encoder
    layer, and under the name with "_input_scale" another for what it reads (wk and wv read what wq does). All
    else stays as it is; so does everything with "compute". May be traced.

    Args:
      params: some or all parts, layers stacked on axis 0.
      precision: of the products.
    """
    if precision == "compute":
        return dict(params)
    quantised = dict(params)
    by_row = functools.partial(_quantise_matrices, precision=precision)
    if "encoder" in params:
        of_layer = _quantise_layer if precision == "fp8" else by_row
        layers = jax.vmap(of_layer)(params["encoder"]["layers"])
        quantised["encoder"] = {**params["encoder"], "layers": layers}
    if "projector" in params:
        quantised["projector"] = by_row(params["projector"])
    return quantised


def _quantise_matrices(weights: Mapping[str, Array], precision: Precision) -> dict[str, Array]:
    quantised = dict(weights)
    for name in INPUT_DIMS.keys() & weights.keys():
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
    """The table of one layer's weights as `quantise_params` leaves them; initial values are of no use.

    Args:
      table: of an encoder layer (`bounded`) or the projector.
      precision: of the products.
      bounded: whether `activation_bounds` knows what the matrices read.
    """
    quantised, one_scale = dict(table), bounded and precision == "fp8"
    if precision == "compute":
        return quantised
    for name in INPUT_DIMS.keys() & table.keys():
        shape, axes, summed = table[name].shape, table[name].axes, INPUT_DIMS[name]
        quantised[name] = Weight(shape[summed:] + shape[:summed], axes[summed:] + axes[:summed], zeros)
        outputs = slice(summed, summed if one_scale else None)
        quantised[f"{name}_scale"] = Weight(shape[outputs], axes[outputs], zeros)
    if one_scale:
        quantised |= {f"{name}_input_scale": Weight((), (), zeros) for name in Bounds._fields}
    return quantised


def operand(x: Float[Array, "... d"], weights: Mapping[str, Array], matrix: str) -> Array | Rows:
    """`x` as products with the `matrix` of a layer's `weights` read it: quantised where that is."""
    dtype, scale = weights[matrix].dtype, weights.get(f"{matrix}_input_scale")
    if dtype.itemsize > 1:
        return x
    return Rows(*quantise(x, dtype, -1)) if scale is None else Rows(quantise_by(x, scale, dtype), scale)


def linear(x: Array | Rows, weights: Mapping[str, Array], matrix: str, bias: str) -> Float[Array, "... m"]:
    """`x @ matrix + bias`, all outputs of the matrix in one dimension.

    Args:
      x: what `operand` made of float[..., D].
      weights: a layer's.
      matrix: name of a matrix with D inputs, in as many dimensions as it has.
      bias: name of its bias, which gives the dtype of the result.

    Raises:
      ConfigError: a gradient is asked for with quantised weights.
    """
    b = weights[bias].reshape(-1)
    if not isinstance(x, Rows):
        # Matrices as two-dimensional: on a GPU, bias, GELU and residual then run within the products.
        return x @ weights[matrix].reshape(x.shape[-1], -1) + b
    weight, scale = weights[matrix], weights[f"{matrix}_scale"]
    if x.scale.ndim == 0:
        return scaled_product(x, weight, scale, dtype=b.dtype) + b
    product = quantised_product(x, weight, scale, dtype=b.dtype)
    return (product + b.astype(jnp.float32)).astype(b.dtype)


def scaled_product(
    rows: Rows, weight: Array, weight_scale: Float[Array, ""], *, dtype: Any
) -> Float[Array, "... m"]:
    """`dtype`[..., M] of fp8 rows and a matrix [output..., input...], both with one scale, a power of two.

    Written as a product of scaled-back operands: the form that XLA's GEMM rewriter takes for fp8, and that
    any other device can compute as it stands.
    """
    rows, weight, weight_scale = _without_gradient((rows, weight, weight_scale))
    matrix = weight.reshape(-1, rows.values.shape[-1])
    x = rows.values.astype(dtype) * rows.scale.astype(dtype)
    dimensions = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, matrix.astype(dtype) * weight_scale.astype(dtype), dimensions)


def quantised_product(
    rows: Rows, weight: Array, weight_scale: Float[Array, "..."], *, dtype: Any
) -> Float[Array, "... m"]:
    """float32[..., M] of 8-bit rows and an 8-bit matrix [output..., input...], scaled back.

    Sums are int32 for int8. For fp8 they are float32, written in `dtype` and then scaled: what a product
    writes is most of what its scaling reads. On Hopper, XLA's default precision lets tensor cores keep fewer
    bits of a running sum (cuBLASLt's fast accumulation); `precision="highest"` would not, and runs slower.
    """
    rows, weight, weight_scale = _without_gradient((rows, weight, weight_scale))
    scale = weight_scale.reshape(-1)
    matrix = weight.reshape(scale.size, math.prod(weight.shape) // scale.size)
    sums = jnp.int32 if weight.dtype == jnp.int8 else dtype
    dimensions = (((rows.values.ndim - 1,), (1,)), ((), ()))
    product = jax.lax.dot_general(rows.values, matrix, dimensions, preferred_element_type=sums)
    return product.astype(jnp.float32) * (rows.scale * scale)


@jax.custom_jvp
def _without_gradient(operands: Any) -> Any:
    return operands


@_without_gradient.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise ConfigError(
        "ModelConfig.visual_matmul is 'fp8' or 'int8'; it must be 'compute' where gradients are taken, since"
        " rounding to 8 bits has none"
    )
