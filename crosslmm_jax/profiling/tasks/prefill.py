"""Prefill: from the frames' pixels on the device and a prompt's tokens to the first logits.

- `prefill`: that alone, as in the paper's figure.
- `prefill+cache`: also leaves the KV caches from which an answer is generated: the decoder's, and T2V's.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from crosslmm_jax.batch import Batch, with_known_visibility
from crosslmm_jax.config import ModelConfig
from crosslmm_jax.model import CrossLMM, flops, logits_of
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
    random_text,
    shapes_of,
    with_scopes,
)
from crosslmm_jax.profiling.record import Record, Request
from crosslmm_jax.profiling.timing import device_facts

ROOM = 256  # free positions in the cache, for an answer


def run(record: Record) -> None:
    """Measures both forms for each V2V scope and number of frames of the request."""
    measure(record, forms=(False, True))


def measure(record: Record, *, forms: Sequence[bool]) -> None:
    """Measures the given forms, True with a cache and False without."""
    record.add_facts(**device_facts())
    request = record.request
    config = config_of(request)
    cases = [
        case(scoped, request, frames, cached=cached)
        for scoped in with_scopes(config, request.v2v_scopes)
        for frames in request.frames
        for cached in forms
    ]
    run_cases(cases, record, make_weights=functools.partial(random_params, config))


def case(config: ModelConfig, request: Request, frames: int, *, cached: bool) -> Case:
    """One prefill of a prompt with `frames` frames."""
    work = request.workload(frames)
    pixels = frames_shape(config, frames)
    batch = with_known_visibility(random_text(config, work), frames)
    function = _with_cache if cached else _first_logits
    model = CrossLMM(config, stacked=False)

    def lower() -> Lowered:
        return function.lower(model, param_shapes(config), pixels, shapes_of(batch))

    def inputs() -> PyTree:
        return random_frames(config, frames), jax.device_put(batch)

    def call(compiled: Compiled, weights: PyTree, inputs: PyTree, _: None) -> PyTree:
        return compiled(weights, *inputs)

    row = {
        "what": "prefill+cache" if cached else "prefill",
        "frames": frames,
        "tokens_per_frame": config.merge.tokens_per_frame,
        "precision": precision_of(config),
        "text_tokens": work.text,
        "v2v_scope": config.cross_attention.v2v_scope,
    }
    return Case(
        row=row, lower=lower, inputs=inputs, call=call,
        input_bytes=num_bytes((pixels, batch)), costs=flops.prefill(config, work),
        compiler_options=matmul_options(),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames="model")
def _first_logits(model: CrossLMM, params: PyTree, frames: Array, batch: Batch[Array]) -> Array:
    """float32[1, V] logits of the token after the prompt, and nothing else."""
    visual = model.apply({"params": params}, frames, method="encode")
    hidden: PyTree = model.apply({"params": params}, visual, batch, method="hidden")
    decoder = params["decoder"]
    head = decoder["embedding"].T if model.config.decoder.tie_embeddings else decoder["lm_head"]
    return logits_of(hidden[:, -1:], head.astype(hidden.dtype))[:, 0]


@functools.partial(jax.jit, static_argnames="model")
def _with_cache(model: CrossLMM, params: PyTree, frames: Array, batch: Batch[Array]) -> PyTree:
    """The same logits, and a cache with ROOM for an answer."""
    visual = model.apply({"params": params}, frames, method="encode")
    length = batch.tokens.shape[1]
    counts = jnp.full(batch.tokens.shape[:1], length, jnp.int32)
    return model.apply({"params": params}, visual, batch, counts, cache_size=length + ROOM, method="prefill")
