"""Random weights and prompts at real size, as shapes first and as arrays later.

Programs are compiled from shapes, before a weight exists: what compiling allocates (autotuning tries
kernels on scratch memory) then stays below the weights and out of the peaks that are measured.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from crosslmm_jax.config import PARTS, ModelConfig
from crosslmm_jax.errors import UserError
from crosslmm_jax.model import init_params
from crosslmm_jax.presets import get_preset
from crosslmm_jax.profiling.flops import Workload

WEIGHT_STD = 0.02  # Hugging Face's initialiser, as the peers have it
OPEN_GATE = 0.5
LARGE = 2**24  # numbers in an array that is made on its own


def preset_with_tokens(name: str, tokens_per_frame: int | None) -> ModelConfig:
    """The preset `name`, with another number of compact tokens a frame where one is given.

    Raises:
      UserError: not a square number.
    """
    config = get_preset(name)
    if tokens_per_frame is None:
        return config
    grid = math.isqrt(max(tokens_per_frame, 0))
    if grid == 0 or grid**2 != tokens_per_frame:
        raise UserError(f"--tokens-per-frame {tokens_per_frame}: give a square number, e.g. 1, 9 or 16")
    return dataclasses.replace(config, merge=dataclasses.replace(config.merge, grid=grid))


def param_shapes(config: ModelConfig, parts: Collection[str] = PARTS) -> Any:
    """Shapes and dtypes of inference weights: matrices in the compute dtype, norms and gates float32."""
    abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    abstract = {part: abstract[part] for part in parts}

    def stored(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        name = path[-1].key
        dtype = leaf.dtype if _is_norm(name) or name == "gate" else jnp.dtype(config.compute_dtype)
        return jax.ShapeDtypeStruct(leaf.shape, dtype)

    return jax.tree_util.tree_map_with_path(stored, abstract)


def random_params(config: ModelConfig, parts: Collection[str] = PARTS) -> Any:
    """Arrays of `param_shapes`, made on the device in their own dtype, gates open.

    The largest come first, one by one, so that no moment holds more memory than all weights do in the end;
    the small ones then come together, in one program.
    """
    flat, tree = jax.tree_util.tree_flatten_with_path(param_shapes(config, parts))
    values: list[Any] = [None] * len(flat)
    large = sorted((i for i in range(len(flat)) if flat[i][1].size >= LARGE), key=lambda i: -flat[i][1].size)
    for i in large:
        values[i] = jax.block_until_ready(_random_leaf(*flat[i]))
    small = [i for i in range(len(flat)) if values[i] is None]
    made = jax.jit(lambda: [_random_leaf(*flat[i]) for i in small])()
    for i, value in zip(small, made, strict=True):
        values[i] = value
    return jax.tree_util.tree_unflatten(tree, values)


def _random_leaf(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Array:
    name = path[-1].key
    if name == "gate":
        return jnp.full(leaf.shape, OPEN_GATE, leaf.dtype)
    if _is_norm(name) and not name.endswith("bias"):
        return jnp.ones(leaf.shape, leaf.dtype)
    seed = zlib.crc32(jax.tree_util.keystr(path).encode())
    return random_array(leaf.shape, leaf.dtype, seed=seed)


def _is_norm(name: str) -> bool:
    return "norm" in name


def random_array(shape: tuple[int, ...], dtype: Any, *, seed: int, std: float = WEIGHT_STD) -> Array:
    """Gaussian with standard deviation `std`, on the device."""
    return _normal(jax.random.key(seed, impl="rbg"), tuple(shape), jnp.dtype(dtype), std)


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "std"))
def _normal(key: Array, shape: tuple[int, ...], dtype: Any, std: float) -> Array:
    if len(shape) < 3:
        return std * jax.random.normal(key, shape, dtype)
    # Layer by layer: random bits are wider than bfloat16.
    return jax.lax.map(
        lambda k: std * jax.random.normal(k, shape[1:], dtype), jax.random.split(key, shape[0])
    )


def random_prompt(config: ModelConfig, work: Workload, *, seed: int = 0) -> dict[str, np.ndarray]:
    """One row, as numpy arrays: text, a video of random pixels, text; without padding."""
    rng = np.random.default_rng(seed)
    length, visual = work.length(config), work.frames * config.merge.tokens_per_frame
    slots = np.arange(work.before, work.before + visual)
    visible = np.zeros((1, length), np.int32)
    visible[0, work.before :] = work.frames
    size = config.vision.image_size
    loss_mask = np.zeros((1, length), np.float32)
    loss_mask[0, work.before + visual :] = 1
    tokens = rng.integers(0, config.decoder.vocab_size, (1, length))
    return {
        "frames": rng.integers(0, 256, (1, work.frames, size, size, 3), dtype=np.uint8),
        "frame_mask": np.ones((1, work.frames), bool),
        "frame_times": np.arange(work.frames, dtype=np.float32)[None],
        "tokens": tokens.astype(np.int32),
        "positions": np.arange(length, dtype=np.int32)[None],
        "loss_mask": loss_mask,
        "visual_slots": slots[None].astype(np.int32),
        "text_slots": np.setdiff1d(np.arange(length), slots)[None].astype(np.int32),
        "visible_frames": visible,
        "row_index": np.zeros(1, np.int32),
    }


def shapes_of(tree: Any) -> Any:
    """The tree with shapes and dtypes in place of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def num_bytes(tree: Any) -> int:
    """Bytes that the arrays (or shapes) of a tree take."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
