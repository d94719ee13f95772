"""Random weights and prompts at real size, first as shapes, later as arrays.

Programs are compiled from shapes, before a weight exists. What compiling allocates (autotuning tries
kernels on scratch memory) then stays below the weights and out of the measured peaks.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import KeyPath
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from crosslmm_jax.batch import Batch
from crosslmm_jax.config import PARTS, ModelConfig
from crosslmm_jax.config_io import apply_overrides
from crosslmm_jax.errors import UserError
from crosslmm_jax.model import flops, has_own_dtype, init_params, quantise_params, separate_layers
from crosslmm_jax.presets import get_preset
from crosslmm_jax.profiling.record import Request

WEIGHT_STD = 0.02  # Hugging Face's initialiser
OPEN_GATE = 0.5
CODE_STD = 25.0  # of random numbers in 8 bits: five standard deviations fit into int8
INPUT_SCALE = 2.0**-3  # of so400m's matrix inputs in fp8, by `activation_bounds`, with norms of one
LARGE = 2**24  # numbers in an array that is finished before the next one starts


def preset_with_tokens(name: str, tokens_per_frame: int | None) -> ModelConfig:
    """The preset `name`, if given with another number of compact tokens per frame.

    Raises:
      UserError: an unknown preset, or not a square number.
    """
    config = get_preset(name)
    if tokens_per_frame is None:
        return config
    grid = math.isqrt(max(tokens_per_frame, 0))
    if grid == 0 or grid**2 != tokens_per_frame:
        raise UserError(f"--tokens-per-frame {tokens_per_frame}: give a square number, e.g. 1, 9 or 16")
    return dataclasses.replace(config, merge=dataclasses.replace(config.merge, grid=grid))


def config_of(request: Request) -> ModelConfig:
    """The model configuration that a request names, with its overrides applied.

    Raises:
      UserError: an unknown preset or field, or a value that does not fit.
    """
    config = preset_with_tokens(request.system, request.tokens_per_frame).at_precision(request.precision)
    return apply_overrides(config, request.overrides, source="profile") if request.overrides else config


def with_scopes(config: ModelConfig, scopes: Sequence[str]) -> list[ModelConfig]:
    """`config` with each of the V2V scopes; without scopes, `config` alone."""
    cross = config.cross_attention
    replaced = [dataclasses.replace(cross, v2v_scope=scope) for scope in scopes or (cross.v2v_scope,)]
    return [dataclasses.replace(config, cross_attention=cross) for cross in replaced]


def precision_of(config: ModelConfig) -> str:
    """The word for it in a row: the compute dtype, or the 8-bit type of `ModelConfig.at_precision`."""
    return config.compute_dtype if config.visual_matmul == "compute" else config.visual_matmul


def param_shapes(config: ModelConfig, parts: Collection[str] = PARTS, *, stacked: bool = False) -> PyTree:
    """Shapes and dtypes of inference weights: matrices in the compute dtype, norms and gates in float32.

    With `visual_matmul`, matrices of encoder and projector are in 8 bits and their scales in float32.

    Args:
      config: the model configuration.
      parts: the parts to include.
      stacked: one array for all layers, as in training; else one per layer, as in inference.
    """
    abstract = jax.eval_shape(
        lambda: quantise_params(init_params(config, jax.random.key(0)), config.visual_matmul)
    )
    abstract = abstract if stacked else separate_layers(abstract)
    abstract = {part: abstract[part] for part in parts}

    def stored(path: KeyPath, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        keeps = has_own_dtype(_name(path), leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if keeps else jnp.dtype(config.compute_dtype))

    return jax.tree_util.tree_map_with_path(stored, abstract)


def random_params(config: ModelConfig, parts: Collection[str] = PARTS, *, stacked: bool = False) -> PyTree:
    """Random arrays of the shapes of `param_shapes`, made on the device in their dtypes, with open gates.

    The largest are made first, so that memory never exceeds what all weights take in the end.
    """
    flat, tree = jax.tree_util.tree_flatten_with_path(param_shapes(config, parts, stacked=stacked))
    values: dict[int, Array] = {}
    for i in sorted(range(len(flat)), key=lambda i: -flat[i][1].size):
        values[i] = _random_leaf(*flat[i])
        if values[i].size >= LARGE:
            jax.block_until_ready(values[i])
    return jax.tree_util.tree_unflatten(tree, [values[i] for i in range(len(flat))])


def _name(path: KeyPath) -> str:
    """The last key on the path to a leaf of nested dicts."""
    return path[-1].key  # type: ignore[attr-defined]  # all nodes are dicts


def _random_leaf(path: KeyPath, leaf: jax.ShapeDtypeStruct) -> Array:
    name = _name(path)
    if name == "gate":
        return jnp.full(leaf.shape, OPEN_GATE, leaf.dtype)
    if name.endswith("_input_scale"):
        return jnp.full(leaf.shape, INPUT_SCALE, leaf.dtype)
    if name.endswith("_scale") and "norm" not in name:
        return jnp.full(leaf.shape, WEIGHT_STD / CODE_STD, leaf.dtype)
    if "norm" in name and not name.endswith("bias"):
        return jnp.ones(leaf.shape, leaf.dtype)
    seed = zlib.crc32(jax.tree_util.keystr(path).encode())
    return random_array(leaf.shape, leaf.dtype, seed=seed)


def random_array(shape: tuple[int, ...], dtype: DTypeLike, *, seed: int, std: float = WEIGHT_STD) -> Array:
    """Gaussian numbers on the device. In 8 bits `std` is CODE_STD: a scale is applied later."""
    if jnp.dtype(dtype).itemsize == 1:
        std = CODE_STD
    return _normal(jax.random.key(seed, impl="rbg"), tuple(shape), jnp.dtype(dtype), std)


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "std"))
def _normal(key: Array, shape: tuple[int, ...], dtype: np.dtype, std: float) -> Array:
    drawn = jnp.dtype(jnp.bfloat16) if dtype.itemsize == 1 else dtype
    return (std * jax.random.normal(key, shape, drawn)).astype(dtype)


def frames_shape(config: ModelConfig, frames: int) -> jax.ShapeDtypeStruct:
    """uint8[1, F, R, R, 3]."""
    size = config.vision.image_size
    return jax.ShapeDtypeStruct((1, frames, size, size, 3), jnp.uint8)


def random_frames(config: ModelConfig, frames: int, *, seed: int = 0) -> Array:
    """uint8[1, F, R, R, 3] of random pixels, made on the device: those of a long video take gigabytes."""
    return _random_pixels(jax.random.key(seed, impl="rbg"), frames_shape(config, frames).shape)


@functools.partial(jax.jit, static_argnames="shape")
def _random_pixels(key: Array, shape: tuple[int, ...]) -> Array:
    keys = jax.random.split(key, shape[1])
    return jax.lax.map(lambda k: jax.random.bits(k, shape[2:], jnp.uint8), keys)[None]


def random_prompt(config: ModelConfig, work: flops.Workload, *, seed: int = 0) -> Batch[np.ndarray]:
    """One row for training: text, a video of random pixels, and text with targets. No padding."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, frames_shape(config, work.frames).shape, dtype=np.uint8)
    loss_mask = np.zeros((1, work.length(config)), np.float32)
    loss_mask[0, work.before + work.frames * config.merge.tokens_per_frame :] = 1
    return random_text(config, work, seed=seed)._replace(
        frames=pixels, loss_mask=loss_mask, row_index=np.zeros(1, np.int32)
    )


def random_text(config: ModelConfig, work: flops.Workload, *, seed: int = 0) -> Batch[np.ndarray]:
    """`random_prompt` without pixels and targets, for a prefill of a video that is encoded already."""
    rng = np.random.default_rng(seed)
    length, visual = work.length(config), work.frames * config.merge.tokens_per_frame
    visible = np.zeros((1, length), np.int32)
    visible[0, work.before :] = work.frames
    return Batch.create(
        tokens=rng.integers(0, config.decoder.vocab_size, (1, length)).astype(np.int32),
        visual_slots=np.arange(work.before, work.before + visual, dtype=np.int32)[None],
        visible_frames=visible,
        frame_times=np.arange(work.frames, dtype=np.float32)[None],
    )


def shapes_of(tree: PyTree) -> PyTree:
    """`tree` with shapes and dtypes in place of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def num_bytes(tree: PyTree) -> int:
    """Bytes of the arrays (or shapes) of `tree`."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
