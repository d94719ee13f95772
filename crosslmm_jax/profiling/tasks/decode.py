"""Decode: tokens generated in one loop on the device, compared with the time to read memory once."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from crosslmm_jax.config import ModelConfig
from crosslmm_jax.inference import Generation, RowSettings, generate
from crosslmm_jax.model import DTYPES, CrossLMM, KeysValues, KVCache, flops
from crosslmm_jax.profiling.cases import Case, Compiled, Lowered, run_cases
from crosslmm_jax.profiling.inputs import (
    CODE_STD,
    config_of,
    num_bytes,
    param_shapes,
    precision_of,
    random_array,
    random_params,
)
from crosslmm_jax.profiling.record import Record, Request, Row
from crosslmm_jax.profiling.timing import device_facts, memory_facts

CACHE_BUCKET = 256  # the multiple to which inference rounds the size of a cache


def run(record: Record) -> None:
    """Measures the time per token after prompts with each number of frames of the request."""
    request = record.request
    config = config_of(request)
    record.add_facts(**device_facts(), **memory_facts(repeats=request.repeats))
    cases = [case(config, request, frames, record.facts["memory_tb_per_s"]) for frames in request.frames]
    run_cases(cases, record, make_weights=functools.partial(random_params, config))


def case(config: ModelConfig, request: Request, frames: int, memory_tb_per_s: float) -> Case:
    """Greedy generation of `request.steps` tokens after a prompt with `frames` frames."""
    cached = request.workload(frames).length(config)
    size = -(-(cached + request.steps) // CACHE_BUCKET) * CACHE_BUCKET
    options = {"steps": request.steps, "vocab_size": config.decoder.vocab_size}
    rows = RowSettings.of(limit=request.steps)  # no token ends the answer
    t2v_shapes, state_shapes = jax.eval_shape(lambda: _state(config, frames, cached, size))

    def lower() -> Lowered:
        shapes = param_shapes(config)
        return generate.lower(
            CrossLMM(config, stacked=False), shapes, t2v_shapes, state_shapes, rows, **options
        )

    def inputs() -> PyTree:
        t2v, state = _state(config, frames, cached, size)
        return {"t2v": t2v, "state": state}

    def prepare(inputs: PyTree) -> Generation:
        """The state at the end of the prompt, in the buffers of the last call."""
        state = inputs.pop("state")
        cache = state.cache._replace(num_tokens=jnp.full((1,), cached, jnp.int32))
        return state._replace(cache=cache, count=jnp.zeros((1,), jnp.int32))

    def call(compiled: Compiled, weights: PyTree, inputs: PyTree, state: Generation) -> PyTree:
        tokens, ended, inputs["state"] = compiled(weights, inputs["t2v"], state, rows)
        return tokens, ended

    num_read = bytes_read(config, num_bytes(t2v_shapes))
    floor_ms = 1e-9 * sum(num_read.values()) / memory_tb_per_s

    def finish(row: Row) -> Row:
        return {"floor_ms": floor_ms, "over_floor": row["ms"] / floor_ms, "bytes_read": num_read}

    row = {
        "what": "decode",
        "frames": frames,
        "tokens_per_frame": config.merge.tokens_per_frame,
        "precision": precision_of(config),
        "text_tokens": request.text,
        "generated_tokens": request.steps,
    }
    return Case(
        row=row, lower=lower, call=call, prepare=prepare, finish=finish, per_call=request.steps,
        inputs=inputs, input_bytes=num_bytes((t2v_shapes, state_shapes)),
        costs=flops.decode(config, frames=frames, cached=cached + request.steps // 2),
    )  # fmt: skip


def bytes_read(config: ModelConfig, t2v_bytes: int) -> dict[str, int]:
    """Bytes that the decode step of one token must read: weights, and T2V's KV cache of the video.

    Of the embedding a step reads one row, unless the head is tied to it. T2V's weights of keys and values
    are not read.

    Args:
      config: the model configuration.
      t2v_bytes: size of T2V's KV cache.
    """
    shapes = param_shapes(config)
    decoder = dict(shapes["decoder"])
    if not config.decoder.tie_embeddings:
        del decoder["embedding"]
    unread = {"wk", "wv", "bk", "bv", "kv_norm"}
    t2v = [leaf for layer in shapes["t2v"].values() for name, leaf in layer.items() if name not in unread]
    if "t2v" not in config.cross_attention.directions:
        return {"weights": num_bytes(decoder)}
    return {"weights": num_bytes((decoder, t2v)), "t2v": t2v_bytes}


def _state(config: ModelConfig, frames: int, cached: int, size: int) -> tuple[PyTree, Generation]:
    """T2V's KV cache, and a generation after `cached` tokens in a cache for `size` tokens, both random."""
    d, dtype = config.decoder, jnp.dtype(config.compute_dtype)

    def random(shape: tuple[int, ...], count: int, seed: int, dtype: jnp.dtype) -> tuple[Array, ...]:
        return tuple(random_array(shape, dtype, seed=seed + 2 * i, std=1.0) for i in range(count))

    t2v, heads, layers = None, (d.num_kv_heads, d.head_dim), len(config.cross_attention_layers)
    if "t2v" in config.cross_attention.directions:
        stored = DTYPES.get(config.cross_attention.cache_dtype, dtype)
        shape = (1, frames, config.vision.num_patches, *heads)
        keys, values = (random(shape, layers, seed, stored) for seed in (1000, 1001))
        scale = None if stored == dtype else jnp.full((1, *heads), 1 / CODE_STD)
        t2v = tuple(KeysValues(*pair, scale, scale) for pair in zip(keys, values, strict=True))
    keys, values = (random((1, size, *heads), d.num_layers, seed, dtype) for seed in (2000, 2001))
    cache = KVCache(keys, values, jnp.full((1,), cached, jnp.int32), jnp.full((1,), frames, jnp.int32), None)
    none = jnp.zeros((1,), jnp.int32)
    return t2v, Generation(cache, none, none, jnp.zeros((1,), bool))
