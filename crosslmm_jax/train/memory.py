"""Memory that one device needs for a training step, from sizes alone; and how many rows fit at once.

The state is exact: the shards of `abstract_state`. Activations follow the program: what a layer keeps for its
backward pass, what is recomputed, and which arrays exist at the same time. The peak is the largest of three
phases of the backward pass: the loss, a group of decoder layers, a chunk of the encoder.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from crosslmm_jax.config import ModelConfig, StageConfig
from crosslmm_jax.model import LOGITS_AT_ONCE, encoder_frame_bytes, frame_chunk
from crosslmm_jax.train.stages import model_of_stage, trained_shares
from crosslmm_jax.train.state import TrainState, state_bytes_per_device

# Share of a device's memory that a step may fill: allocators lose some of it between arrays.
USABLE = 0.92


class Shape(NamedTuple):
    """Rows of a batch, padded."""

    frames: int  # F
    text: int  # text tokens; T = text + F * C


class StepBytes(NamedTuple):
    """Bytes of one device."""

    weights: int  # trainable and frozen
    moments: int  # of the optimiser
    gradients: int  # float32, of the trainable weights
    pixels: int  # of all rows of the step
    activations: int  # in the largest phase of the backward pass

    @property
    def total(self) -> int:
        """All of them exist at the peak."""
        return sum(self)


def step_bytes(
    config: ModelConfig,
    stage: StageConfig,
    abstract: TrainState,
    mesh: Mapping[str, int],
    shape: Shape,
    *,
    batch_size: int,
    microbatches: int,
    memory: int | None = None,
) -> StepBytes:
    """Bytes per device of a step.

    Args:
      config: the model.
      stage: what learns.
      abstract: the state with its shardings, `abstract_state`.
      mesh: devices along each axis.
      shape: of the rows.
      batch_size: rows of a global batch.
      microbatches: per global batch.
      memory: bytes of a device, by which `frame_chunk` is chosen; None: of this process's devices.
    """
    config = model_of_stage(config, stage)
    rows = -(-batch_size // (mesh["data"] * mesh["fsdp"]))
    at_once = -(-rows // microbatches)
    state = state_bytes_per_device(abstract)
    pixels = rows * -(-shape.frames // mesh["context"]) * 3 * config.vision.image_size**2
    return StepBytes(
        weights=state.trainable + state.frozen,
        moments=state.moments,
        gradients=state.gradients * (1 if microbatches == 1 else 2),  # the sum, and those of a microbatch
        pixels=pixels,
        activations=_activations(config, stage, abstract, mesh, shape, rows=at_once, memory=memory),
    )


def fewest_microbatches(
    config: ModelConfig,
    stage: StageConfig,
    abstract: TrainState,
    mesh: Mapping[str, int],
    shapes: Iterable[Shape],
    *,
    batch_size: int,
    memory: int | None,
) -> int:
    """The smallest number of microbatches with which a step fits, or as many as there are rows per device.

    Arguments as of `step_bytes`; all of `shapes` have to fit. 1 if `memory` is not known.
    """
    if memory is None:
        return 1
    rows, shapes = batch_size // (mesh["data"] * mesh["fsdp"]), list(shapes)
    for microbatches in (count for count in range(1, rows + 1) if rows % count == 0):
        needed = max(
            step_bytes(
                config, stage, abstract, mesh, shape,
                batch_size=batch_size, microbatches=microbatches, memory=memory,
            ).total
            for shape in shapes
        )  # fmt: skip
        if needed <= USABLE * memory:
            return microbatches
    return max(rows, 1)


def _activations(
    config: ModelConfig, stage: StageConfig, abstract: TrainState, mesh: Mapping[str, int], shape: Shape, *,
    rows: int, memory: int | None,
) -> int:  # fmt: skip
    """Bytes of the largest phase of the backward pass, for `rows` rows at once."""
    vision, d, cross = config.vision, config.decoder, config.cross_attention
    size = jnp.dtype(config.compute_dtype).itemsize
    tokens = rows * (shape.text + shape.frames * config.merge.tokens_per_frame)
    patches = rows * -(-shape.frames // mesh["context"]) * vision.num_patches
    learns = trained_shares(config, stage).keys()
    visual_learns = bool({"encoder", "projector"} & learns)

    inputs, encoder = _encoder(config, stage, abstract, mesh, shape, rows=rows, memory=memory)
    # Original tokens, which every layer with cross-attention reads, and their gradient.
    originals = patches * _source_width(config) * size * (1 + visual_learns)
    projector = patches * (vision.width + d.width) * size * visual_learns  # inputs of its two products
    groups = -(-d.num_layers // cross.cross_attn_every)
    carries = (groups if d.remat else 0) * tokens * d.width * size  # a group is computed again from its input
    decoder = _decoder(config, abstract, mesh, tokens=tokens, patches=patches)
    loss = _loss(config, mesh, tokens=tokens, learns="decoder" in learns)
    return inputs + originals + max(projector + carries + max(decoder, loss), encoder)


def _source_width(config: ModelConfig) -> int:
    projected = config.cross_attention.kv_source == "projected"
    return config.decoder.width if projected else config.vision.width


def _encoder(
    config: ModelConfig, stage: StageConfig, abstract: TrainState, mesh: Mapping[str, int], shape: Shape, *,
    rows: int, memory: int | None,
) -> tuple[int, int]:  # fmt: skip
    """Bytes that all layers keep for the backward pass, and those that a chunk of frames takes besides."""
    vision, shards = config.vision, math.prod(mesh.values())
    size = jnp.dtype(config.compute_dtype).itemsize
    # The frames of all rows lie over all devices.
    frames = -(-rows * mesh["data"] * mesh["fsdp"] * shape.frames // shards)
    chunks = -(-frames // frame_chunk(config, memory))
    of_frame = encoder_frame_bytes(config)
    at_once = -(-frames // max(chunks, 1))
    if "encoder" not in trained_shares(config, stage):
        return 0, at_once * of_frame
    # Per layer and frame, as `model.encode_frames` has them.
    kept = {"none": 3 * of_frame, "elementwise": of_frame * 4 // 5}
    of_layers = vision.depth * kept.get(vision.remat, vision.num_patches * vision.width * size)
    inside = 2 * at_once * of_frame  # activations of a layer, and their gradients
    if chunks > 1:  # the sum over chunks, a chunk's gradient, and the weights, which no chunk changes
        weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract.params["encoder"]))
        inside += weights * (4 + 4 + size) // mesh["tensor"]
    return (0, inside + at_once * of_layers) if vision.remat == "chunk" else (frames * of_layers, inside)


def _decoder(
    config: ModelConfig, abstract: TrainState, mesh: Mapping[str, int], *, tokens: int, patches: int
) -> int:
    """Bytes of a group of layers that is computed again, with gradients, and of its gathered weights."""
    d, cross, tensor = config.decoder, config.cross_attention, mesh["tensor"]
    size = jnp.dtype(config.compute_dtype).itemsize
    heads, kv = d.num_heads * d.head_dim // tensor, d.num_kv_heads * d.head_dim // tensor
    of_layer = tokens * (6 * d.width + 2 * heads + 2 * kv + 3 * d.mlp_width // tensor)
    of_direction = patches * (_source_width(config) + 2 * kv) + tokens * (2 * d.width + 2 * heads)
    groups = -(-d.num_layers // cross.cross_attn_every)
    layers, crossed = (cross.cross_attn_every, 1) if d.remat else (d.num_layers, groups)
    activations = 2 * (layers * of_layer + crossed * len(cross.directions) * of_direction) * size
    if math.prod(mesh.values()) == 1:
        return activations
    params = abstract.params
    stacked = jax.tree.leaves((params["decoder"]["layers"], params["v2v"], params["t2v"]))
    weights = sum(math.prod(leaf.shape) for leaf in stacked) // groups // tensor
    return activations + 2 * weights * size  # and their gradients, before they are shared out


def _loss(config: ModelConfig, mesh: Mapping[str, int], *, tokens: int, learns: bool) -> int:
    """Bytes of hidden states and their gradient, of a chunk's logits, and of the head and its gradient."""
    d, size = config.decoder, jnp.dtype(config.compute_dtype).itemsize
    logits = 3 * 4 * min(LOGITS_AT_ONCE, tokens) * d.vocab_size // mesh["tensor"]  # softmax, gradient
    head = d.width * d.vocab_size // mesh["tensor"]
    return 2 * tokens * d.width * size + logits + head * (size + 4 * learns)
