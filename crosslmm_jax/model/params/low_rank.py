"""LoRA (arXiv:2106.09685): a frozen matrix W and a product of two narrow ones, of which only A and B learn.

    x W + scale * (x A) B        A: inputs x rank, B: rank x outputs; scale = alpha / rank

An `Adapted` matrix takes the place of an array in the parameters. The products of `model.ops` take both, so
that layers do not know the difference. W + scale A B is computed by `merge_adapters` alone: in training, one
product more with each of A and B costs less than the gradient of a whole matrix.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jaxtyping import Array, Float, PyTree

from crosslmm_jax.model.params.tables import Params, Weight, uniform, zeros


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """The adapter of one matrix, or of a stack of matrices on a leading axis."""

    a: Array  # float[*inputs, rank]
    b: Array  # float[rank, *outputs]
    scale: float = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A matrix and its adapter."""

    base: Array  # float[*inputs, *outputs]
    low_rank: LowRank

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the matrix."""
        return self.base.shape


Matrix = Array | Adapted


def low_rank_weights(weight: Weight, *, inputs: int, rank: int) -> tuple[Weight, Weight]:
    """Shapes, logical axes and initial values of A and B of a matrix, or of a stack of them.

    B is 0, so that training starts from the base model. A is uniform within 1 / sqrt(inputs), as in Hugging
    Face's PEFT: learning rates found there carry over. A and B are sharded like the matrix; the one without
    an axis of width along its rank.

    Args:
      weight: the matrix; its first axis may be "layers".
      inputs: dimensions that a product sums over.
      rank: of the adapter.
    """
    lead = int(weight.axes[0] == "layers")
    stacks, at = slice(lead), lead + inputs
    a_shape, a_axes = weight.shape[lead:at], weight.axes[lead:at]
    b_shape, b_axes = weight.shape[at:], weight.axes[at:]
    a = Weight(
        (*weight.shape[stacks], *a_shape, rank), (*weight.axes[stacks], *a_axes, _rank_axis(a_axes)),
        uniform(1 / math.sqrt(math.prod(a_shape))),
    )  # fmt: skip
    b = Weight(
        (*weight.shape[stacks], rank, *b_shape), (*weight.axes[stacks], _rank_axis(b_axes), *b_axes), zeros
    )
    return a, b


def _rank_axis(axes: tuple[str | None, ...]) -> str | None:
    return None if {"embed", "vision_embed"} & set(axes) else "lora_rank"


def as_matrix(weight: Matrix, inputs: int) -> Matrix:
    """`weight` in two dimensions: all inputs, which are its first `inputs` dimensions, by all outputs."""
    if not isinstance(weight, Adapted):
        return weight.reshape(math.prod(weight.shape[:inputs]), -1)
    low = weight.low_rank
    a, b = low.a.reshape(-1, low.a.shape[-1]), low.b.reshape(low.b.shape[0], -1)
    base = weight.base.reshape(len(a), -1)
    return Adapted(base, LowRank(a, b, low.scale))


def scale_inputs(weight: Matrix, scale: Float[Array, " d"]) -> Matrix:
    """`diag(scale) weight`, for a matrix with inputs in one dimension."""
    if not isinstance(weight, Adapted):
        return _scale_first(weight, scale)
    low = weight.low_rank
    return Adapted(_scale_first(weight.base, scale), LowRank(_scale_first(low.a, scale), low.b, low.scale))


def _scale_first(x: Array, scale: Float[Array, " d"]) -> Array:
    return scale.reshape(-1, *[1] * (x.ndim - 1)) * x


def heads_first(weight: Matrix) -> Matrix:
    """`weight`, float[D, K, H], as K matrices float[D, H] in a stack."""
    if not isinstance(weight, Adapted):
        return jnp.moveaxis(weight, 1, 0)
    low, base = weight.low_rank, jnp.moveaxis(weight.base, 1, 0)
    a = jnp.broadcast_to(low.a, (base.shape[0], *low.a.shape))
    return Adapted(base, LowRank(a, jnp.moveaxis(low.b, 1, 0), low.scale))


def with_head(weight: Matrix) -> Matrix:
    """One matrix of `heads_first`, float[D, H], as float[D, 1, H]."""
    if not isinstance(weight, Adapted):
        return weight[:, None]
    low = weight.low_rank
    return Adapted(weight.base[:, None], LowRank(low.a, low.b[:, None], low.scale))


def without_adapters(params: PyTree) -> Params:
    """`params` with the matrix alone in the place of each adapted one."""
    return jax.tree.map(lambda w: w.base if _is_adapted(w) else w, params, is_leaf=_is_adapted)


def merge_adapters(params: PyTree[Array]) -> Params:
    """`params` with W + scale A B in the place of each adapted matrix: float32, sharded like W."""
    return jax.tree.map(
        lambda w: _merged(w, w.base.sharding) if _is_adapted(w) else w, params, is_leaf=_is_adapted
    )


def _merged(weight: Adapted, sharding: Sharding) -> Array:
    return jax.jit(_merge, out_shardings=sharding)(weight)


def _merge(weight: Adapted) -> Array:
    """Of a stack."""
    base, low = weight.base.astype(jnp.float32), weight.low_rank
    count, rank = base.shape[0], low.a.shape[-1]
    a, b = low.a.reshape(count, -1, rank), low.b.reshape(count, rank, -1)
    product = jnp.einsum("lir,lro->lio", a, b, precision="highest", preferred_element_type=jnp.float32)
    return base + low.scale * product.reshape(base.shape)


def _is_adapted(value: object) -> bool:
    return isinstance(value, Adapted)
