"""The model's attentions one by one, with every backend, at the shapes of a prefill and of decoding.

Cross-attention on cuDNN is also measured with its keys split into KV splits, for each given number of splits.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from crosslmm_jax.cli.profile import requests_of
from crosslmm_jax.config import ModelConfig
from crosslmm_jax.model import flops, frame_chunk
from crosslmm_jax.model.attention.cudnn import split_attention
from crosslmm_jax.model.attention.dispatch import Backend, attention
from crosslmm_jax.model.attention.mosaic import is_applicable
from crosslmm_jax.profiling import Case, Record, Request, check_counts, run_cases, timing
from crosslmm_jax.profiling.cases import Compiled, Lowered
from crosslmm_jax.profiling.inputs import config_of, num_bytes, random_array
from perf.measure import measure, measuring_parser

BACKENDS: tuple[Backend, ...] = ("auto", "cudnn", "mosaic", "blockwise")
BLOCKWISE_TFLOP = 4.0  # the portable backend is not tried on more work: it would take a second


@dataclass(frozen=True, kw_only=True)
class AttentionRequest(Request):
    """Also says into how many KV splits keys are split; each number is measured."""

    kv_splits: tuple[int, ...] = ()


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
    ranged: bool = False  # has a stop per query, as cross-attention in training; not with KV splits

    @property
    def pairs(self) -> int:
        """Query-key pairs that are read."""
        one = flops.causal_pairs(self.queries) if self.causal else self.queries * self.keys
        return self.batch * one


def main(argv: Sequence[str]) -> None:
    """Measures all attentions of the presets."""
    parser = measuring_parser("attention", __doc__)
    parser.add_argument(
        "--kv-splits", type=int, nargs="+", default=[], metavar="N",
        help="each that divides the number of keys is measured",
    )  # fmt: skip
    args = parser.parse_args(argv)
    check_counts("--kv-splits", args.kv_splits)
    requests = requests_of(args, AttentionRequest, __name__, kv_splits=tuple(args.kv_splits))
    measure("attention", requests, args)


def run(record: Record) -> None:
    """Measures every attention with every backend that applies to it."""
    request = record.request
    assert isinstance(request, AttentionRequest)
    config = config_of(request)
    record.add_facts(**timing.device_facts(), **timing.memory_facts(repeats=request.repeats))
    rate = record.facts["memory_tb_per_s"]
    cases = []
    for frames in request.frames:
        for shape in shapes(config, request, frames):
            for backend in BACKENDS:
                if _applies(backend, shape, config):
                    cases.append(case(config, shape, frames, backend, rate))
            splits = shape.ranged and _applies("cudnn", shape, config)
            for count in dict.fromkeys(request.kv_splits):
                if splits and shape.keys % count == 0:
                    cases.append(case(config, shape, frames, "cudnn", rate, count))
    run_cases(cases, record, make_weights=dict)


def _applies(backend: Backend, shape: Shape, config: ModelConfig) -> bool:
    if backend == "mosaic":
        q, kv, _ = _arrays(shape, config)
        return not shape.ranged and is_applicable(q, kv, causal=shape.causal)
    if backend == "cudnn":
        return jax.default_backend() == "gpu" and config.compute_dtype == "bfloat16"
    tflop = 4e-12 * shape.pairs * shape.heads * shape.size
    return backend == "auto" or tflop <= BLOCKWISE_TFLOP


def _arrays(shape: Shape, config: ModelConfig) -> PyTree:
    """Shapes of queries, keys (and values), and stops."""
    dtype = jnp.dtype(config.compute_dtype)
    q = jax.ShapeDtypeStruct((shape.batch, shape.queries, shape.heads, shape.size), dtype)
    kv = jax.ShapeDtypeStruct((shape.batch, shape.keys, shape.kv_heads, shape.size), dtype)
    return q, kv, jax.ShapeDtypeStruct((shape.batch, shape.queries), jnp.int32)


def shapes(config: ModelConfig, request: Request, frames: int) -> list[Shape]:
    """The attentions of a prefill with `frames` frames and of the decode steps after it."""
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
    kv_splits: int | None = None,
) -> Case:  # fmt: skip
    """One attention with one backend; with `kv_splits`, cuDNN over all keys in that many KV splits."""
    q, kv, stop = _arrays(shape, config)

    def inputs() -> PyTree:
        arrays = [random_array(x.shape, x.dtype, seed=seed, std=1.0) for seed, x in enumerate((q, kv, kv))]
        return [*arrays, jnp.full(stop.shape, shape.keys, jnp.int32)]

    def lower() -> Lowered:
        if kv_splits is not None:
            return _attend_in_splits.lower(q, kv, kv, stop, kv_splits=kv_splits)
        return _attend.lower(q, kv, kv, stop, causal=shape.causal, ranged=shape.ranged, backend=backend)

    def call(compiled: Compiled, _: PyTree, inputs: PyTree, __: None) -> PyTree:
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
    if kv_splits is not None:
        row["kv_splits"] = kv_splits
    return Case(
        row=row, lower=lower, inputs=inputs, call=call, input_bytes=num_bytes((q, kv, kv, stop)), costs=cost,
        per_call=timing.IN_A_ROW,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("causal", "ranged", "backend"))
def _attend(
    q: Array, k: Array, v: Array, stop: Array, *, causal: bool, ranged: bool, backend: Backend
) -> Array:
    return attention(q, k, v, causal=causal, kv_stop=stop if ranged else None, backend=backend)


@functools.partial(jax.jit, static_argnames="kv_splits")
def _attend_in_splits(q: Array, k: Array, v: Array, stop: Array, *, kv_splits: int) -> Array:
    del stop  # all keys, as for a prompt that sees the whole video; a decode step limits them by length
    return split_attention(q, k, v, None, kv_splits)[0]
