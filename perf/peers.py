"""The peers: Hugging Face models in torch, from their configs, with random weights on the same GPU.

`llava-onevision-7b` and `-0.5b` are `LlavaOnevisionForConditionalGeneration` with 196 tokens a frame;
`siglip` is the vision tower alone. A name with `-compiled` behind it runs under `torch.compile`.

How the peer is run at its best: weights and activations in bfloat16, SDPA attention, `inference_mode`, no
attention mask (a mask would rule out the flash kernel), logits of the last position only, pixels normalised
and on the device before the clock starts, no pooling head and no tower layer that is not read.
"""

import functools
import time
from typing import Any

from crosslmm_jax.config import DecoderConfig, ModelConfig
from crosslmm_jax.errors import UserError
from crosslmm_jax.presets import get_preset
from crosslmm_jax.profiling import flops
from crosslmm_jax.profiling.record import Record
from crosslmm_jax.profiling.timing import measure, summary

OURS = {"llava-onevision-7b": "crosslmm_7b", "llava-onevision-0.5b": "crosslmm_0.5b"}  # the same sizes
TINY = {"llava-onevision-tiny": "tiny", "siglip-tiny": "tiny"}  # for tests
COMPILED = "-compiled"
PEERS = ("llava-onevision-7b", "llava-onevision-0.5b", "siglip", *TINY)
TASKS = {"prefill": "llava", "encoder": "siglip"}
VIDEO_TOKEN = 3


def check(peer: str, task: str) -> None:
    """Raises a `UserError` unless `peer` is one that `crosslmm profile TASK` can measure."""
    kind = TASKS.get(task)
    known = [name for name in PEERS if kind is not None and name.startswith(kind)]
    if peer.removesuffix(COMPILED) not in known:
        names = ", ".join(name for name in known if name not in TINY)
        hint = f"choose one of {names}, or one of them with {COMPILED} behind it" if known else "leave it out"
        raise UserError(f"--peer {peer!r} is no peer for `crosslmm profile {task}`; {hint}")


def run(record: Record) -> None:
    """Measures the peer that the request names at each frame count."""
    import torch

    request = record.request
    name = request.system.removesuffix(COMPILED)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = get_preset({**OURS, **TINY}.get(name, "crosslmm_7b"))
    record.add_facts(**_facts(device), **_matmul_rate(device))
    begin = time.perf_counter()
    model = _make(name, sizes, device)
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


def _facts(device: str) -> dict[str, Any]:
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"device": name, "platform": "torch " + device}


def _matmul_rate(device: str) -> dict[str, Any]:
    import torch

    size = 8192 if device == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def ten(_: Any) -> Any:
        product: Any = None
        for _ in range(10):
            product = a @ b
        return product

    timed = measure(ten, repeats=7, wait=_wait(device))
    timed = summary([sample / 10 for sample in timed["samples_ms"]])
    return {"matmul_tflops": 2e-9 * size**3 / timed["ms"], "matmul": {"size": size, **timed}}


def _wait(device: str) -> Any:
    import torch

    def wait(result: Any) -> Any:
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return wait


def vision_fields(sizes: ModelConfig) -> dict[str, Any]:
    """Hugging Face's fields of our tower, cut off above the layer that is read, without a head."""
    v = sizes.vision
    return {
        "model_type": "siglip_vision_model", "hidden_size": v.width, "intermediate_size": v.mlp_width,
        "patch_size": v.patch_size, "image_size": v.image_size, "num_hidden_layers": v.depth,
        "num_attention_heads": v.num_heads, "vision_use_head": False,
    }  # fmt: skip


def text_fields(decoder: DecoderConfig) -> dict[str, Any]:
    """Hugging Face's fields of our decoder."""
    return {
        "model_type": "qwen2", "hidden_size": decoder.width, "intermediate_size": decoder.mlp_width,
        "num_hidden_layers": decoder.num_layers, "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads, "vocab_size": decoder.vocab_size,
        "max_position_embeddings": 65536, "tie_word_embeddings": decoder.tie_embeddings,
    }  # fmt: skip


def _make(name: str, sizes: ModelConfig, device: str) -> Any:
    """The model with random bfloat16 weights, made on the device."""
    import torch
    from transformers import AutoModel, AutoModelForImageTextToText, LlavaOnevisionConfig, SiglipVisionConfig

    options = {"attn_implementation": "sdpa", "dtype": torch.bfloat16}
    with torch.device(device):
        if name.startswith("siglip"):
            fields = {key: value for key, value in vision_fields(sizes).items() if key != "model_type"}
            model = AutoModel.from_config(SiglipVisionConfig(**fields), **options)
        else:
            config = LlavaOnevisionConfig(
                vision_config=vision_fields(sizes), text_config=text_fields(sizes.decoder),
                video_token_index=VIDEO_TOKEN, image_token_index=VIDEO_TOKEN + 1, vision_feature_layer=-1,
                tie_word_embeddings=sizes.decoder.tie_embeddings,
            )  # fmt: skip
            model = AutoModelForImageTextToText.from_config(config, **options)
    return model.to(device).eval()  # not to a dtype: rotary frequencies stay float32


def _attention(model: Any) -> list[str]:
    parts = {type(part).__name__: getattr(part, "config", None) for part in model.modules()}
    known = {name: getattr(config, "_attn_implementation", None) for name, config in parts.items()}
    return sorted({f"{name}: {value}" for name, value in known.items() if value})


def _pixels(sizes: ModelConfig, frames: int, device: str) -> Any:
    import torch

    side = sizes.vision.image_size
    return torch.rand(frames, 3, side, side, device=device, dtype=torch.bfloat16) * 2 - 1


def tokens_per_frame(sizes: ModelConfig) -> int:
    """Tokens that LLaVA-OneVision keeps of a frame of a video: half the patches a side, rounded up."""
    return (-(-sizes.vision.grid // 2)) ** 2


def _prefill(model: Any, sizes: ModelConfig, record: Record, frames: int, device: str) -> None:
    import torch

    request = record.request
    per_frame = tokens_per_frame(sizes)
    work = request.workload(frames)
    weights = _memory(device)
    pixels = _pixels(sizes, frames, device)[None]
    text = torch.randint(VIDEO_TOKEN + 2, sizes.decoder.vocab_size, (1, work.text), device=device)
    video = torch.full((1, frames * per_frame + 1), VIDEO_TOKEN, device=device)
    ids = torch.cat([text[:, : work.before], video, text[:, work.before :]], dim=1)

    def call(_: None, use_cache: bool) -> Any:
        return model(input_ids=ids, pixel_values_videos=pixels, use_cache=use_cache, logits_to_keep=1)

    for what, use_cache in (("prefill", False), ("prefill+cache", True)):
        row = {"what": what, "frames": frames, "tokens_per_frame": per_frame, "text_tokens": work.text}
        timed = _timed(functools.partial(call, use_cache=use_cache), record, device, weights)
        costs = flops.llava_onevision(sizes, work, tokens_per_frame=per_frame)
        record.add_row(row | timed, costs)


def _encode(model: Any, sizes: ModelConfig, record: Record, frames: int, device: str) -> None:
    weights = _memory(device)
    pixels = _pixels(sizes, frames, device)

    def call(_: None) -> Any:
        return model(pixel_values=pixels).last_hidden_state

    row = {"what": "encoder", "frames": frames, "tokens_per_frame": sizes.vision.num_patches}
    timed = _timed(call, record, device, weights)
    record.add_row(row | timed, {"encoder": flops.encoder(sizes, frames)["encoder"]})


def _memory(device: str) -> int:
    import torch

    return torch.cuda.memory_allocated() if device == "cuda" else 0


def _timed(call: Any, record: Record, device: str, weights: int) -> dict[str, Any]:
    """Time, and on a GPU the peak over the weights, inputs counted as they are for ours."""
    import torch

    begin = time.perf_counter()
    _wait(device)(call(None))
    first_s = time.perf_counter() - begin
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    timed = measure(call, repeats=record.request.repeats, warmup=1, wait=_wait(device))
    peak = (torch.cuda.max_memory_allocated() - weights) / 1e6 if device == "cuda" else None
    return {**timed, "peak_mb": peak, "peak_from": "allocator", "compile_s": first_s}
