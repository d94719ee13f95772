"""The vision encoder: alone, and with pooling and projector as in a prefill."""

import functools

import jax
from jaxtyping import Array, PyTree

from crosslmm_jax.config import ModelConfig
from crosslmm_jax.model import CrossLMM, SiglipEncoder, flops, frame_chunk
from crosslmm_jax.parallel import matmul_options
from crosslmm_jax.profiling.cases import Case, Compiled, Lowered, run_cases
from crosslmm_jax.profiling.inputs import (
    config_of,
    frames_shape,
    num_bytes,
    param_shapes,
    precision_of,
    random_frames,
    random_params,
)
from crosslmm_jax.profiling.record import Record
from crosslmm_jax.profiling.timing import device_facts

PARTS = ("encoder", "projector")


def run(record: Record) -> None:
    """Measures `encoder` (pixels to features) and `encode` (pixels to compact and original tokens)."""
    record.add_facts(**device_facts())
    config = config_of(record.request)
    cases = [case(config, frames, what) for frames in record.request.frames for what in ("encoder", "encode")]
    run_cases(cases, record, make_weights=functools.partial(random_params, config, PARTS))


def case(config: ModelConfig, frames: int, what: str) -> Case:
    """`frames` frames through the encoder, or with `what="encode"` through encoder, pool and projector."""
    shape = frames_shape(config, frames)
    function = _features if what == "encoder" else _encode

    def call(compiled: Compiled, weights: PyTree, pixels: Array, _: None) -> PyTree:
        return compiled(weights, pixels)

    def lower() -> Lowered:
        return function.lower(CrossLMM(config, stacked=False), param_shapes(config, PARTS), shape)

    costs = flops.encoder(config, frames)
    row = {
        "what": what,
        "frames": frames,
        "tokens_per_frame": config.merge.tokens_per_frame,
        "precision": precision_of(config),
    }
    return Case(
        row=row,
        lower=lower,
        inputs=functools.partial(random_frames, config, frames),
        call=call,
        input_bytes=num_bytes(shape),
        costs={"encoder": costs["encoder"]} if what == "encoder" else costs,
        compiler_options=matmul_options(),
    )


@functools.partial(jax.jit, static_argnames="model")
def _encode(model: CrossLMM, params: PyTree, frames: Array) -> PyTree:
    return model.apply({"params": params}, frames, method="encode")


@functools.partial(jax.jit, static_argnames="model")
def _features(model: CrossLMM, params: PyTree, frames: Array) -> PyTree:
    """float[F, P, W], computed in the model's chunks of frames."""
    config = model.config
    encoder = SiglipEncoder(
        config.vision, config.compute_dtype, config.attention, matmul=config.visual_matmul, stacked=False
    )
    count, chunk = frames.shape[1], frame_chunk(config)
    count = count // chunk if count % chunk == 0 else 1
    chunks = frames.reshape(count, -1, *frames.shape[2:])

    def encode(frames: Array) -> PyTree:
        return encoder.apply({"params": params["encoder"]}, frames)

    return encode(chunks[0]) if count == 1 else jax.lax.map(encode, chunks)
