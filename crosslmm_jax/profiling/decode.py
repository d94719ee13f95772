"""Decode: generated tokens in one loop on the device, against the time that reading memory once takes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from crosslmm_jax.config import ModelConfig
from crosslmm_jax.inference import Generation, Sampling, generate
from crosslmm_jax.model import DTYPES, CrossLMM, KeysValues, KVCache
from crosslmm_jax.profiling import flops, timing
from crosslmm_jax.profiling.cases import Case, run_cases
from crosslmm_jax.profiling.inputs import (
    CODE_STD,
    config_of,
    num_bytes,
    param_shapes,
    precision_of,
    random_array,
    random_params,
)
from crosslmm_jax.profiling.record import Record, Request

CACHE_BUCKET = 256  # as inference rounds a cache's room
NEVER = -1  # no token ends the answer


def run(record: Record) -> None:
    """Measures a token's time behind prompts with each of the frame counts that the request names."""
    request = record.request
    config = config_of(request)
    rates = timing.memory_rate(repeats=request.repeats)
    record.add_facts(memory_tb_per_s=rates["memory_tb_per_s"], memory=rates)
    cases = [case(config, request, frames, rates["memory_tb_per_s"]) for frames in request.frames]
    run_cases(cases, record, make_weights=functools.partial(random_params, config))


def case(config: ModelConfig, request: Request, frames: int, memory_tb_per_s: float) -> Case:
    """Greedy generation of `request.steps` tokens behind a prompt with `frames` frames."""
    cached = request.workload(frames).length(config)
    room = -(-(cached + request.steps) // CACHE_BUCKET) * CACHE_BUCKET
    options = {"steps": request.steps, "vocab_size": config.decoder.vocab_size, "end": NEVER}
    limit, sampling = jnp.int32(request.steps), Sampling()
    t2v_shapes, state_shapes = jax.eval_shape(lambda: _state(config, frames, cached, room))

    def lower() -> Any:
        shapes = param_shapes(config)
        return generate.lower(
            CrossLMM(config, stacked=False), shapes, t2v_shapes, state_shapes, limit, sampling, **options
        )

    def inputs() -> dict[str, Any]:
        t2v, state = _state(config, frames, cached, room)
        return {"t2v": t2v, "state": state}

    def prepare(inputs: dict[str, Any]) -> Generation:
        """Back to the end of the prompt, in the buffers that the last call left."""
        state = inputs.pop("state")
        return state._replace(cache=state.cache._replace(num_tokens=jnp.full((1,), cached, jnp.int32)))

    def call(compiled: Any, weights: Any, inputs: dict[str, Any], state: Generation) -> Any:
        tokens, counts, inputs["state"] = compiled(weights, inputs["t2v"], state, limit, sampling)
        return tokens, counts

    read = bytes_read(config, num_bytes(t2v_shapes))
    floor_ms = 1e-9 * sum(read.values()) / memory_tb_per_s

    def finish(row: dict[str, Any]) -> dict[str, Any]:
        return {"floor_ms": floor_ms, "over_floor": row["ms"] / floor_ms, "bytes_read": read}

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
        inputs=inputs, input_bytes=num_bytes((t2v_shapes, state_shapes._replace(key=None))),
        costs=flops.decode(config, frames=frames, cached=cached + request.steps // 2),
    )  # fmt: skip


def bytes_read(config: ModelConfig, t2v_bytes: int) -> dict[str, int]:
    """Bytes that one token must read: weights that it meets, and T2V's keys and values of the video.

    Of the embedding it reads a row, unless the head is tied to it; of T2V's weights not those of keys and
    values.
    """
    shapes = param_shapes(config)
    decoder = dict(shapes["decoder"])
    if not config.decoder.tie_embeddings:
        del decoder["embedding"]
    of_keys = {"wk", "wv", "bk", "bv", "kv_norm"}
    t2v = [leaf for layer in shapes["t2v"].values() for name, leaf in layer.items() if name not in of_keys]
    if "t2v" not in config.cross_attention.directions:
        return {"weights": num_bytes(decoder)}
    return {"weights": num_bytes((decoder, t2v)), "t2v": t2v_bytes}


def _state(config: ModelConfig, frames: int, cached: int, room: int) -> tuple[Any, Generation]:
    """T2V keys and values, and a generation behind `cached` tokens, both random."""
    d, dtype = config.decoder, jnp.dtype(config.compute_dtype)

    def random(shape: tuple[int, ...], count: int, seed: int, dtype: Any) -> tuple[Array, ...]:
        return tuple(random_array(shape, dtype, seed=seed + 2 * i, std=1.0) for i in range(count))

    own, video = (1, room), (1, frames, config.vision.num_patches)
    t2v, heads, layers = None, (d.num_kv_heads, d.head_dim), len(config.cross_attention_layers)
    if "t2v" in config.cross_attention.directions:
        stored = DTYPES.get(config.cross_attention.cache_dtype, dtype)
        keys, values = (random((*video, *heads), layers, seed, stored) for seed in (1000, 1001))
        scale = None if stored == dtype else jnp.full((1, *heads), 1 / CODE_STD)
        t2v = tuple(KeysValues(*pair, scale, scale) for pair in zip(keys, values, strict=True))
    keys, values = (random((*own, *heads), d.num_layers, seed, dtype) for seed in (2000, 2001))
    cache = KVCache(keys, values, jnp.full((1,), cached, jnp.int32), jnp.full((1,), frames, jnp.int32), None)
    return t2v, Generation(cache, jnp.zeros((1,), jnp.int32), jnp.zeros((1,), bool), jax.random.key(0))
