"""Errors of 8 bits: encoder features, projected tokens and logits against float32, on frames of real videos.

Accuracy only, so it may run on a CPU. Weights are random at real size and have no outlier channels, which
trained models have. A second set of rows has such channels added (`with_outliers`).
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from crosslmm_jax.batch import Batch, with_known_visibility
from crosslmm_jax.cli.profile import requests_of
from crosslmm_jax.config import ModelConfig, Precision
from crosslmm_jax.errors import UserError
from crosslmm_jax.model import CrossLMM, quantise_params
from crosslmm_jax.model.encode_frames import Visual, encode_in_chunks
from crosslmm_jax.model.ops import layer_norm
from crosslmm_jax.model.params.tables import cast
from crosslmm_jax.model.quantisation.quantise import DTYPES, QuantisedRows, quantise, quantised_product
from crosslmm_jax.parallel import program
from crosslmm_jax.profiling import Record, Request, Row, timing
from crosslmm_jax.profiling.inputs import (
    OPEN_GATE,
    WEIGHT_STD,
    preset_with_tokens,
    random_params,
    random_prompt,
)
from perf.clips import read_clips
from perf.measure import measure, measuring_parser

OUTLIERS_EVERY, OUTLIER_SCALE = 200, 20.0  # 0.5% of the channels


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionRequest(Request):
    """Also names the folder of the videos."""

    videos: str


class Encoded(NamedTuple):
    """Output of encoder and projector for one clip."""

    features: Array  # [F, P, W]
    visual: Visual


# Precision of encoder and projector -> those of T2V's KV cache that are measured with it.
CACHES: dict[Precision, tuple[Precision, ...]] = {
    "compute": ("compute", "fp8", "int8"), "fp8": ("compute", "fp8"), "int8": ("compute", "int8"),
}  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Compares all precisions for the presets."""
    parser = measuring_parser("precision", __doc__)
    parser.add_argument("--videos", required=True, metavar="DIR", help="folder of real videos")
    args = parser.parse_args(argv)
    if args.figure is not None:
        raise UserError("--figure with precision: leave it out, there is no time or memory to draw")
    measure("precision", requests_of(args, PrecisionRequest, __name__, videos=args.videos), args)


def run(record: Record) -> None:
    """Adds the rows of all precisions, for both kinds of weights, at each number of frames of the request."""
    request = record.request
    assert isinstance(request, PrecisionRequest)
    config = preset_with_tokens(request.system, request.tokens_per_frame)
    record.add_facts(**timing.device_facts(), note=_note(config))
    for frames in request.frames:
        clips = read_clips(request.videos, frames=frames, size=config.vision.image_size)
        shared = {"frames": frames, "clips": len(clips), "tokens_per_frame": config.merge.tokens_per_frame}
        for kind in ("random", "outliers"):
            params = random_params(dataclasses.replace(config, compute_dtype="float32"), stacked=True)
            if kind == "outliers":
                params = jax.jit(with_outliers, donate_argnums=0)(params)
            for row in compare(config, request, params, list(clips.values())):
                record.add_row({**shared, "weights": kind, **row})


def _note(config: ModelConfig) -> str:
    return (
        f"{config.vision.depth} encoder layers of width {config.vision.width},"
        f" {config.decoder.num_layers} decoder layers of width {config.decoder.width}, gates"
        f" {OPEN_GATE}; random weights (standard deviation {WEIGHT_STD}), compared with float32; what a row"
        " does not name is in bfloat16. Rows 'outliers':"
        f" {1 / OUTLIERS_EVERY:.1%} of the channels of the encoder's LayerNorm outputs, of its hidden units"
        f" and of T2V's keys and values are {OUTLIER_SCALE:g} times as large, and the weights that read them"
        " are as much smaller. Errors are of single numbers; rms is that of the float32 numbers."
    )


def with_outliers(params: dict[str, PyTree]) -> dict[str, PyTree]:
    """`params` with outlier channels, as trained transformers have them.

    The weights that read such a channel are as much smaller. So the function stays nearly the same (not
    quite: GELU lies between a hidden unit and its reader), and errors compare with those of `params`.
    """
    layers, t2v = dict(params["encoder"]["layers"]), dict(params["t2v"])

    def larger(size: int) -> Array:
        return jnp.ones(size).at[::OUTLIERS_EVERY].set(OUTLIER_SCALE)

    width = larger(layers["w1"].shape[1])
    for norm, readers in (("norm1", ("wq", "wk", "wv")), ("norm2", ("w1",))):
        for name in (f"{norm}_scale", f"{norm}_bias"):
            layers[name] = layers[name] * width
        for name in readers:
            layers[name] = layers[name] / width.reshape(-1, *[1] * (layers[name].ndim - 2))
    hidden = larger(layers["w1"].shape[2])
    layers |= {"w1": layers["w1"] * hidden, "b1": layers["b1"] * hidden, "w2": layers["w2"] / hidden[:, None]}
    kv_heads, size = t2v["wk"].shape[2:]
    channels = larger(kv_heads * size).reshape(kv_heads, size)
    readers = jnp.repeat(channels, t2v["wq"].shape[2] // kv_heads, axis=0)
    t2v |= {name: t2v[name] * channels for name in ("wk", "bk", "wv", "bv")}
    t2v |= {name: t2v[name] / readers for name in ("wq", "bq")}
    t2v["wo"] = t2v["wo"] / readers[..., None]
    return {**params, "t2v": t2v, "encoder": {**params["encoder"], "layers": layers}}


def compare(
    config: ModelConfig, request: Request, params: dict[str, PyTree], clips: list[np.ndarray]
) -> Iterator[Row]:
    """The rows of all precisions. Donates `params`, which are in float32."""
    wide = dataclasses.replace(config, compute_dtype="float32")
    with jax.default_matmul_precision("highest"):  # GPUs and TPUs would use fewer bits
        exact = [encode(wide, params, clip) for clip in clips]
        exact_logits = np.concatenate([logits(wide, request, params, clip.visual) for clip in exact])
        rows = product_rows(config, params, exact[0].features)
    yield from rows
    params = jax.jit(functools.partial(cast, dtype=config.compute_dtype), donate_argnums=0)(params)
    for products, caches in CACHES.items():
        chosen = dataclasses.replace(config, visual_matmul=products)
        quantised = jax.jit(functools.partial(quantise_params, precision=products))(
            {part: params[part] for part in ("encoder", "projector")}
        )
        found = [encode(chosen, quantised, clip) for clip in clips]
        row = {"products": config.compute_dtype if products == "compute" else products}
        for what, of in (("features", lambda x: x.features), ("tokens", lambda x: x.visual.originals)):
            yield {"what": what, **row, **differences(*(_rows(map(of, part)) for part in (found, exact)))}
        for cache in caches:
            # From `config`, not `chosen`: so a model is compiled once per cache, not per product.
            cross = dataclasses.replace(config.cross_attention, cache_dtype=cache)
            cached = dataclasses.replace(config, cross_attention=cross)
            got = np.concatenate([logits(cached, request, params, clip.visual) for clip in found])
            row["cache"] = config.compute_dtype if cache == "compute" else cache
            yield {"what": "logits", **row, **differences(got, exact_logits), **choices(got, exact_logits)}


def _rows(parts: Iterable[Array]) -> Float[np.ndarray, "n d"]:
    return np.concatenate([np.asarray(x, np.float32).reshape(-1, x.shape[-1]) for x in parts])


def encode(config: ModelConfig, params: PyTree, frames: np.ndarray) -> Encoded:
    """Features and visual tokens of a clip uint8[F, R, R, 3]."""
    parts = {part: params[part] for part in ("encoder", "projector")}
    return program(_encode)(CrossLMM(config), parts, frames)


def _encode(model: CrossLMM, params: PyTree, frames: Array) -> Encoded:
    def both(model: PyTree) -> Encoded:
        features = model.encoder(frames)  # `encode` would compute them again
        visual = encode_in_chunks(
            features[None], encode=lambda x: x, pool=model.pooler, config=model.config, rules=None
        )
        return Encoded(features, visual)

    encoded: PyTree = model.apply({"params": params}, method=both)
    return encoded


def logits(config: ModelConfig, request: Request, params: PyTree, visual: Visual) -> Float[np.ndarray, "t v"]:
    """float32[T, V] after each text token of a random prompt: prefill of the video, then decode steps."""
    frames = visual.originals.shape[1]
    work = request.workload(frames)
    batch = random_prompt(config, work)
    end = work.before + frames * config.merge.tokens_per_frame
    prompt = Batch.create(
        tokens=batch.tokens[:, :end], visual_slots=batch.visual_slots,
        visible_frames=batch.visible_frames.counts[:, :end],
    )  # fmt: skip
    prompt = with_known_visibility(prompt, frames)
    parts = {part: params[part] for part in ("v2v", "t2v", "decoder")}
    model = CrossLMM(config)
    return np.asarray(program(_logits)(model, parts, visual, prompt, batch.tokens[:, end:]))


def _logits(model: CrossLMM, params: PyTree, visual: Visual, prompt: Batch[Array], text: Array) -> Array:
    variables = {"params": params}
    end, steps = prompt.tokens.shape[1], text.shape[1]
    counts = jnp.full((1,), end, jnp.int32)
    cache: PyTree = model.apply(variables, visual, prompt, counts, cache_size=end + steps, method="prefill")[
        1
    ]
    t2v = cache.t2v

    def step(cache: PyTree, token: Array) -> PyTree:
        one = jnp.ones((1,), jnp.int32)
        extended: PyTree = model.apply(
            variables, cache._replace(t2v=t2v), token[:, None], one, method="extend"
        )
        logits, cache = extended
        return cache._replace(t2v=None), logits[0]

    return jax.lax.scan(step, cache._replace(t2v=None), text.T)[1]


def differences(got: Float[np.ndarray, "n d"], expected: Float[np.ndarray, "n d"]) -> dict[str, float]:
    """Cosine of each row with the expected one, and errors of single numbers."""
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(expected, axis=1)
    cosines = np.einsum("nd,nd->n", got, expected) / norms
    errors = np.abs(got - expected)
    return {
        "cosine_mean": float(cosines.mean()), "cosine_min": float(cosines.min()),
        "error_mean": float(errors.mean()), "error_max": float(errors.max()),
        "rms": float(np.sqrt(np.mean(expected**2))),
    }  # fmt: skip


def choices(got: Float[np.ndarray, "n v"], expected: Float[np.ndarray, "n v"]) -> dict[str, float]:
    """KL divergence in nats from the expected next-token distribution; how often the top token agrees."""
    log_p, log_q = (np.asarray(jax.nn.log_softmax(x.astype(np.float64), axis=-1)) for x in (expected, got))
    kl = np.sum(np.exp(log_p) * (log_p - log_q), axis=1)
    return {
        "kl_mean": float(kl.mean()), "kl_max": float(kl.max()),
        "top1": float(np.mean(got.argmax(axis=1) == expected.argmax(axis=1))),
    }  # fmt: skip


def product_rows(config: ModelConfig, params: PyTree, features: Array) -> list[Row]:
    """One product, of normalised features with the first layer's w1: a scale per row and channel, or one."""
    layer = {name: value[0] for name, value in params["encoder"]["layers"].items()}
    features = features.reshape(-1, features.shape[-1])
    x = layer_norm(features, layer["norm2_scale"], layer["norm2_bias"], eps=config.vision.layer_norm_eps)
    expected = np.asarray(x @ layer["w1"])
    rows = []
    for precision, dtype in DTYPES.items():
        for scales, axes in (("by row and channel", -1), ("one for all", (0, 1))):
            weight, weight_scale = quantise(layer["w1"].T, dtype, axes)
            scale = jnp.broadcast_to(weight_scale, (len(weight), 1))
            got = quantised_product(
                QuantisedRows(*quantise(x, dtype, axes)), weight, scale, dtype=jnp.float32
            )
            row = {"what": "product", "products": precision, "scales": scales}
            rows.append({**row, **differences(np.asarray(got), expected)})
    return rows
