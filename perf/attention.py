"""The attentions of the model one by one: every backend at the shapes that a prefill and a decode have."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from crosslmm_jax.config import ModelConfig
from crosslmm_jax.model.attention.cudnn import split_attention
from crosslmm_jax.model.attention.dispatch import Backend, attention
from crosslmm_jax.model.attention.mosaic import is_applicable
from crosslmm_jax.model.encode_frames import frame_chunk
from crosslmm_jax.profiling import flops, timing
from crosslmm_jax.profiling.cases import Case, run_cases
from crosslmm_jax.profiling.inputs import config_of, num_bytes, random_array
from crosslmm_jax.profiling.record import Record, Request

BACKENDS: tuple[Backend, ...] = ("auto", "cudnn", "mosaic", "blockwise")
BLOCKWISE_TFLOP = 4.0  # on more work than this the portable backend is not tried: it would take a second


class Shape(NamedTuple):
    """One attention: T queries of N heads over S keys of K heads, each of size H."""

    what: str
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    size: int
    causal: bool = False
    ranged: bool = False  # called with a stop a query, as cross-attention is in training; in parts, without

    @property
    def pairs(self) -> int:
        """Query-key pairs that are read."""
        one = flops.causal_pairs(self.queries) if self.causal else self.queries * self.keys
        return self.batch * one


def run(record: Record) -> None:
    """Measures every attention with every backend that applies to it."""
    request = record.request
    config = config_of(request)
    rates = timing.memory_rate(repeats=request.repeats)
    record.add_facts(memory_tb_per_s=rates["memory_tb_per_s"], memory=rates)
    cases = []
    for frames in request.frames:
        for shape in shapes(config, request, frames):
            for backend in BACKENDS:
                if _applies(backend, shape, config):
                    cases.append(case(config, shape, frames, backend, rates["memory_tb_per_s"]))
            in_parts = shape.ranged and _applies("cudnn", shape, config)
            for parts in dict.fromkeys(request.parts):
                if in_parts and shape.keys % parts == 0:
                    cases.append(case(config, shape, frames, "cudnn", rates["memory_tb_per_s"], parts))
    run_cases(cases, record, make_weights=dict)


def _applies(backend: Backend, shape: Shape, config: ModelConfig) -> bool:
    if backend == "mosaic":
        q, kv, _ = _arrays(shape, config)
        return not shape.ranged and is_applicable(q, kv, causal=shape.causal)
    if backend == "cudnn":
        return jax.default_backend() == "gpu" and config.compute_dtype == "bfloat16"
    tflop = 4e-12 * shape.pairs * shape.heads * shape.size
    return backend == "auto" or tflop <= BLOCKWISE_TFLOP


def _arrays(shape: Shape, config: ModelConfig) -> tuple[Any, Any, Any]:
    """Queries, keys (or values), and stops."""
    dtype = jnp.dtype(config.compute_dtype)
    q = jax.ShapeDtypeStruct((shape.batch, shape.queries, shape.heads, shape.size), dtype)
    kv = jax.ShapeDtypeStruct((shape.batch, shape.keys, shape.kv_heads, shape.size), dtype)
    return q, kv, jax.ShapeDtypeStruct((shape.batch, shape.queries), jnp.int32)


def shapes(config: ModelConfig, request: Request, frames: int) -> list[Shape]:
    """What a prefill with `frames` frames and the decode behind it call."""
    v, d = config.vision, config.decoder
    work = request.workload(frames)
    original, decoder = frames * v.num_patches, (d.num_heads, d.num_kv_heads, d.head_dim)
    length = work.length(config)
    chunk = min(frame_chunk(config), frames)
    return [
        Shape("encoder", chunk, v.num_patches, v.num_patches, v.num_heads, v.num_heads, v.head_dim),
        Shape("self_attention", 1, length, length, *decoder, causal=True),
        Shape("v2v", 1, frames * config.merge.tokens_per_frame, original, *decoder, ranged=True),
        Shape("t2v", 1, work.text, original, *decoder, ranged=True),
        Shape("t2v_decode", 1, 1, original, *decoder, ranged=True),
    ]


def case(
    config: ModelConfig, shape: Shape, frames: int, backend: Backend, memory_tb_per_s: float,
    parts: int | None = None,
) -> Case:  # fmt: skip
    """One attention with one backend; on cuDNN, with all keys read in `parts` parts where that is given."""
    q, kv, stop = _arrays(shape, config)

    def inputs() -> Any:
        arrays = [random_array(x.shape, x.dtype, seed=seed, std=1.0) for seed, x in enumerate((q, kv, kv))]
        return [*arrays, jnp.full(stop.shape, shape.keys, jnp.int32)]

    def lower() -> Any:
        if parts is not None:
            return _attend_in_parts.lower(q, kv, kv, stop, parts=parts)
        return _attend.lower(q, kv, kv, stop, causal=shape.causal, ranged=shape.ranged, backend=backend)

    def call(compiled: Any, _: Any, inputs: Any, __: None) -> Any:
        for _ in range(timing.IN_A_ROW - 1):
            compiled(*inputs)
        return compiled(*inputs)

    moved = num_bytes((q, kv, kv, q))
    cost = {shape.what: flops.Cost(products=4 * shape.pairs * shape.heads * shape.size)}
    row = {
        "what": shape.what,
        "frames": frames,
        "tokens_per_frame": config.merge.tokens_per_frame,
        "backend": backend,
        "shape": shape._asdict(),
        "floor_bytes_ms": 1e-9 * moved / memory_tb_per_s,
    }
    if parts is not None:
        row["parts"] = parts
    return Case(
        row=row, lower=lower, inputs=inputs, call=call, input_bytes=num_bytes((q, kv, kv, stop)), costs=cost,
        per_call=timing.IN_A_ROW,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("causal", "ranged", "backend"))
def _attend(
    q: Array, k: Array, v: Array, stop: Array, *, causal: bool, ranged: bool, backend: Backend
) -> Array:
    return attention(q, k, v, causal=causal, kv_stop=stop if ranged else None, backend=backend)


@functools.partial(jax.jit, static_argnames="parts")
def _attend_in_parts(q: Array, k: Array, v: Array, stop: Array, *, parts: int) -> Array:
    del stop  # all keys, as a prompt whose video is whole reads them; a decode does so by length
    return split_attention(q, k, v, None, parts)[0]
