"""Ours against peers: Hugging Face models in torch, built from configs, with random weights on the same GPU.

| peer | model |
|---|---|
| `llava-onevision-7b`, `-0.5b` | `LlavaOnevisionForConditionalGeneration`, 196 tokens per frame |
| `siglip` | the vision tower alone |
| any of them with the suffix `-compiled` | the same under `torch.compile` |

Peers run at their best: weights and activations in bfloat16, SDPA attention, `inference_mode`, no attention
mask (a mask would rule out the flash kernel), logits of the last position only, pixels normalised and on the
device before the clock starts, no pooling head and no tower layer whose output is not used.
"""

import functools
import time
from collections.abc import Callable, Sequence

from jaxtyping import PyTree

from crosslmm_jax.cli.profile import add_precision, add_v2v_scope, requests_of
from crosslmm_jax.config import DecoderConfig, ModelConfig
from crosslmm_jax.errors import UserError
from crosslmm_jax.model import flops
from crosslmm_jax.presets import get_preset
from crosslmm_jax.profiling import Record, Request, Row, timing
from perf.command import need
from perf.measure import measure, measuring_parser

OURS = {"llava-onevision-7b": "crosslmm_7b", "llava-onevision-0.5b": "crosslmm_0.5b"}  # the same sizes
TINY = {"llava-onevision-tiny": "tiny", "siglip-tiny": "tiny"}  # for tests
COMPILED = "-compiled"
PEERS = ("llava-onevision-7b", "llava-onevision-0.5b", "siglip", *TINY)
TASKS = {"prefill": "llava", "encoder": "siglip"}
VIDEO_TOKEN = 3


def main(argv: Sequence[str]) -> None:
    """Measures the presets, then the peers."""
    parser = measuring_parser("peers", __doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument(
        "--peer", nargs="+", default=[], metavar="NAME",
        help="llava-onevision-7b, llava-onevision-0.5b (prefill), siglip (encoder); also with -compiled",
    )  # fmt: skip
    add_precision(parser)
    add_v2v_scope(parser)
    args = parser.parse_args(argv)
    if args.v2v_scope and args.task != "prefill":
        raise UserError(f"--v2v-scope with {args.task}: give it with prefill")
    requests = requests_of(args, Request, f"crosslmm_jax.profiling.tasks.{args.task}")
    for name in args.peer:
        check(name, args.task)
        need("torch")
    requests += [
        Request(
            task=__name__, system=name, frames=tuple(args.frames), text=args.text_tokens, repeats=args.repeats
        )
        for name in args.peer
    ]
    measure(args.task, requests, args)


def check(peer: str, task: str) -> None:
    """Raises a `UserError` unless `python -m perf peers TASK` can measure `peer`."""
    known = [name for name in PEERS if name.startswith(TASKS[task])]
    if peer.removesuffix(COMPILED) not in known:
        names = ", ".join(name for name in known if name not in TINY)
        raise UserError(
            f"--peer {peer!r} is no peer for {task}; choose one of {names}, also with the suffix {COMPILED}"
        )


def run(record: Record) -> None:
    """Measures the peer of the request at each number of frames."""
    import torch

    request = record.request
    name = request.system.removesuffix(COMPILED)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = get_preset({**OURS, **TINY}.get(name, "crosslmm_7b"))
    record.add_facts(**facts(device))
    begin = time.perf_counter()
    model = make_peer(name, sizes, device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    record.add_facts(
        weights_mb=weights / 1e6, weights_s=time.perf_counter() - begin, attention=_attention(model),
        tuning="bfloat16, SDPA without a mask, inference_mode, logits of the last position",
    )  # fmt: skip
    if request.system.endswith(COMPILED):
        model.compile()
    measure_one = _prefill if name.startswith("llava") else _encode
    for frames in request.frames:
        try:
            with torch.inference_mode():
                measure_one(model, sizes, record, frames, device)
        except Exception as error:  # e.g. out of memory at the largest size
            record.add_error(f"{frames} frames", error)
            if device == "cuda":
                torch.cuda.empty_cache()


def facts(device: str) -> Row:
    """The device, and the rate of a matrix product on it."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"device": name, "platform": "torch " + device, **_matmul_rate(device)}


def _matmul_rate(device: str) -> Row:
    import torch

    size = 8192 if device == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    timed = timing.measure_many(functools.partial(torch.matmul, a, b), repeats=7, wait=_wait(device))
    return {"matmul_tflops": 2e-9 * size**3 / timed["ms"], "matmul": {"size": size, **timed}}


def _wait(device: str) -> Callable[[PyTree], PyTree]:
    import torch

    def wait(result: PyTree) -> PyTree:
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return wait


def vision_fields(sizes: ModelConfig) -> Row:
    """Hugging Face's fields of our tower, without the layers after the feature layer and without a head."""
    v = sizes.vision
    return {
        "model_type": "siglip_vision_model", "hidden_size": v.width, "intermediate_size": v.mlp_width,
        "patch_size": v.patch_size, "image_size": v.image_size, "num_hidden_layers": v.depth,
        "num_attention_heads": v.num_heads, "vision_use_head": False,
    }  # fmt: skip


def text_fields(decoder: DecoderConfig) -> Row:
    """Hugging Face's fields of our decoder."""
    return {
        "model_type": "qwen2", "hidden_size": decoder.width, "intermediate_size": decoder.mlp_width,
        "num_hidden_layers": decoder.num_layers, "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads, "vocab_size": decoder.vocab_size,
        "max_position_embeddings": 65536, "tie_word_embeddings": decoder.tie_embeddings,
    }  # fmt: skip


def make_peer(
    name: str,
    sizes: ModelConfig,
    device: str,
    *,
    video_token: int = VIDEO_TOKEN,
    image_token: int = VIDEO_TOKEN + 1,
    vocab_size: int | None = None,
    attention: str = "sdpa",
) -> PyTree:
    """The torch model with random bfloat16 weights, made on the device.

    Args:
      name: of PEERS.
      sizes: of our model of the same size.
      device: of torch.
      video_token: id of the placeholder of a video.
      image_token: id of the placeholder of an image.
      vocab_size: rows of the embedding; None: as ours.
      attention: implementation, as transformers names it.
    """
    import torch
    from transformers import AutoModel, AutoModelForImageTextToText, LlavaOnevisionConfig, SiglipVisionConfig

    options = {"attn_implementation": attention, "dtype": torch.bfloat16}
    with torch.device(device):
        if name.startswith("siglip"):
            fields = {key: value for key, value in vision_fields(sizes).items() if key != "model_type"}
            model = AutoModel.from_config(SiglipVisionConfig(**fields), **options)
        else:
            text = text_fields(sizes.decoder) | ({"vocab_size": vocab_size} if vocab_size else {})
            config = LlavaOnevisionConfig(
                vision_config=vision_fields(sizes), text_config=text, video_token_index=video_token,
                image_token_index=image_token, vision_feature_layer=-1,
                tie_word_embeddings=sizes.decoder.tie_embeddings,
            )  # fmt: skip
            model = AutoModelForImageTextToText.from_config(config, **options)
    return model.to(device).eval()  # not to a dtype: rotary frequencies stay float32


def _attention(model: PyTree) -> list[str]:
    configs = {type(module).__name__: getattr(module, "config", None) for module in model.modules()}
    known = {name: getattr(config, "_attn_implementation", None) for name, config in configs.items()}
    return sorted({f"{name}: {value}" for name, value in known.items() if value})


def _pixels(sizes: ModelConfig, frames: int, device: str) -> PyTree:
    import torch

    side = sizes.vision.image_size
    return torch.rand(frames, 3, side, side, device=device, dtype=torch.bfloat16) * 2 - 1


def tokens_per_frame(sizes: ModelConfig) -> int:
    """Tokens per video frame of LLaVA-OneVision: half the patches per side, rounded up, squared."""
    return (-(-sizes.vision.grid // 2)) ** 2


def _prefill(model: PyTree, sizes: ModelConfig, record: Record, frames: int, device: str) -> None:
    import torch

    request = record.request
    per_frame = tokens_per_frame(sizes)
    work = request.workload(frames)
    weights = _memory(device)
    pixels = _pixels(sizes, frames, device)[None]
    text = torch.randint(VIDEO_TOKEN + 2, sizes.decoder.vocab_size, (1, work.text), device=device)
    video = torch.full((1, frames * per_frame + 1), VIDEO_TOKEN, device=device)
    ids = torch.cat([text[:, : work.before], video, text[:, work.before :]], dim=1)

    def call(_: None, use_cache: bool) -> PyTree:
        return model(input_ids=ids, pixel_values_videos=pixels, use_cache=use_cache, logits_to_keep=1)

    for what, use_cache in (("prefill", False), ("prefill+cache", True)):
        row = {"what": what, "frames": frames, "tokens_per_frame": per_frame, "text_tokens": work.text}
        timed = _timed(functools.partial(call, use_cache=use_cache), record, device, weights)
        costs = llava_onevision_flops(sizes, work, tokens_per_frame=per_frame)
        record.add_row(row | timed, costs)


def _encode(model: PyTree, sizes: ModelConfig, record: Record, frames: int, device: str) -> None:
    weights = _memory(device)
    pixels = _pixels(sizes, frames, device)

    def call(_: None) -> PyTree:
        return model(pixel_values=pixels).last_hidden_state

    row = {"what": "encoder", "frames": frames, "tokens_per_frame": sizes.vision.num_patches}
    timed = _timed(call, record, device, weights)
    record.add_row(row | timed, {"encoder": flops.encoder(sizes, frames)["encoder"]})


def _memory(device: str) -> int:
    import torch

    return torch.cuda.memory_allocated() if device == "cuda" else 0


def _timed(call: Callable[[None], PyTree], record: Record, device: str, weights: int) -> Row:
    """Time, and on a GPU the peak over the weights, which includes the inputs as for ours."""
    import torch

    begin = time.perf_counter()
    _wait(device)(call(None))
    first_s = time.perf_counter() - begin
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    timed = timing.measure(call, repeats=record.request.repeats, warmup=1, wait=_wait(device))
    peak = (torch.cuda.max_memory_allocated() - weights) / 1e6 if device == "cuda" else None
    return {**timed, "peak_mb": peak, "peak_from": "allocator", "compile_s": first_s}


def llava_onevision_flops(
    config: ModelConfig, work: flops.Workload, *, tokens_per_frame: int = 196
) -> flops.Costs:
    """Prefill of LLaVA-OneVision with our encoder and decoder sizes: no cross-attention, all tokens decoded.

    It projects before it pools, and adds one token after a video.
    """
    v, d = config.vision, config.decoder
    length = work.text + work.frames * tokens_per_frame + 1
    tokens = work.frames * v.num_patches
    return {
        "encoder": flops.encoder(config, work.frames)["encoder"],
        "projector": flops.Cost(2 * tokens * d.width * (v.width + d.width)),
        **flops.decoder(config, queries=length, pairs=flops.causal_pairs(length), logits=1),
    }
