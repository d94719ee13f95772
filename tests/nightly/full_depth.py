"""Parity with torch at the full depth and width of the 2B model, random weights. Minutes and 15 GB of memory.

    python tests/nightly/full_depth.py --json docs/results/full_depth_parity.json

Writes a SigLIP so400m and a Qwen2.5-1.5B of random weights, converts them with `from-hf`, compares every
block with `convert verify` and lets both sides generate greedily. One side is in memory at a time.
"""

import argparse
import dataclasses
import gc
import importlib.metadata
import json
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from crosslmm_jax.batch import Batch
from crosslmm_jax.convert.from_hf import Request, convert_from_hf
from crosslmm_jax.convert.verify import verify
from crosslmm_jax.demo.tokenizer import write_default_tokenizer
from crosslmm_jax.model import CrossLMM
from crosslmm_jax.model_folder import load_model_config, load_weights
from crosslmm_jax.presets import get_preset

PROMPT, NEW_TOKENS = 16, 32
PACKAGES = ("jax", "flax", "torch", "transformers", "numpy")


def randomise(module: torch.nn.Module) -> None:
    """Hugging Face starts norms at 1 and biases at 0, which would hide a forgotten one."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))


def write_sources(root: Path, preset: str) -> None:
    """SigLIP in float32 and Qwen2 in bfloat16, with the sizes of the preset."""
    config = get_preset(preset)
    v, d = config.vision, config.decoder
    torch.manual_seed(0)
    tower = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=v.width, intermediate_size=v.mlp_width, num_hidden_layers=v.num_layers,
            num_attention_heads=v.num_heads, image_size=v.image_size, patch_size=v.patch_size,
        )
    )  # fmt: skip
    randomise(tower)
    tower.save_pretrained(root / "vision")
    del tower
    torch.set_default_dtype(torch.bfloat16)
    decoder = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=d.vocab_size, hidden_size=d.width, intermediate_size=d.mlp_width,
            num_hidden_layers=d.num_layers, num_attention_heads=d.num_heads,
            num_key_value_heads=d.num_kv_heads, max_position_embeddings=d.max_positions,
            rms_norm_eps=d.rms_norm_eps, tie_word_embeddings=d.tie_embeddings, use_sliding_window=False,
            rope_parameters={"rope_type": "default", "rope_theta": d.rope_theta},
        )
    )  # fmt: skip
    torch.set_default_dtype(torch.float32)
    randomise(decoder)
    decoder.save_pretrained(root / "llm")
    write_default_tokenizer(root / "tokenizer", 512)


def torch_greedy(folder: Path, prompt: np.ndarray) -> list[int]:
    """What Hugging Face's `generate` appends to the prompt int32[T]."""
    model = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    with torch.no_grad():
        # No token ends the text: random weights could name it at once.
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def our_greedy(folder: Path, prompt: np.ndarray) -> list[int]:
    """The same with our prefill and cache."""
    config = load_model_config(folder)
    cross = dataclasses.replace(config.cross_attention, directions=())
    config = dataclasses.replace(config, compute_dtype="float32", cross_attention=cross)
    params = load_weights(folder, config, dtype="float32")
    model, length, size = CrossLMM(config), len(prompt), config.vision.image_size
    batch = Batch.create(
        tokens=prompt[None].astype(np.int32), visual_slots=np.zeros((1, 0), np.int32),
        visible_frames=np.zeros((1, length), np.int32),
    )  # fmt: skip

    @jax.jit
    def begin(params, batch):
        visual = model.apply({"params": params}, jnp.zeros((1, 0, size, size, 3), jnp.uint8), method="encode")
        return model.apply(
            {"params": params}, visual, batch, jnp.array([length]), cache_size=length + NEW_TOKENS,
            method="prefill",
        )  # fmt: skip

    @jax.jit
    def go_on(params, cache, token):
        return model.apply({"params": params}, cache, token, jnp.array([1]), method="extend")

    logits, cache = begin(params, batch)
    tokens = []
    for _ in range(NEW_TOKENS):
        tokens.append(int(jnp.argmax(logits[0])))
        logits, cache = go_on(params, cache, jnp.array([[tokens[-1]]]))
    return tokens


def measure(root: Path, preset: str) -> dict:
    """All of it, inside the folder `root`."""
    if not (root / "tokenizer").is_dir():  # written last
        write_sources(root, preset)
        gc.collect()
    request = Request(vision=str(root / "vision"), llm=str(root / "llm"), preset=preset)
    convert_from_hf(request, root / "model", tokenizer=root / "tokenizer")
    result = verify(root / "model", vision=str(root / "vision"), llm=str(root / "llm"))
    print("\n".join(result.lines()), flush=True)
    by_name = {d.block: d for d in result.differences}
    vocabulary = get_preset(preset).decoder.vocab_size
    prompt = np.random.default_rng(0).integers(0, vocabulary, PROMPT).astype(np.int32)
    theirs = torch_greedy(root / "llm", prompt)
    gc.collect()
    ours = our_greedy(root / "model", prompt)
    return {
        "features_max_abs_difference": by_name["features"].max_abs,
        "features_rms": by_name["features"].rms,
        "logits_max_abs_difference": by_name["logits"].max_abs,
        "logits_rms": by_name["logits"].rms,
        "greedy_tokens_identical": ours == theirs,
        "greedy_tokens": ours,
        "verify": result.as_dict(),
    }


def main() -> int:
    """Prints and writes the figures; 1 when they are not within the bar."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="crosslmm_2b", help="default: crosslmm_2b")
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument(
        "--work",
        type=Path,
        help="folder that keeps the weights (9 GB) for another run; default: a temporary one",
    )
    args = parser.parse_args()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        root = args.work or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        figures = measure(root, args.preset)
    config = get_preset(args.preset)
    summary = {
        "command": f"python tests/nightly/full_depth.py --preset {args.preset} --json {args.json}",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "device": f"{jax.devices()[0].platform}, {platform.machine()}",
        "dtype": "float32",
        "encoder": f"{config.vision.depth} of {config.vision.num_layers} layers, width {config.vision.width}",
        "decoder": f"{config.decoder.num_layers} layers, width {config.decoder.width},"
        f" vocabulary {config.decoder.vocab_size}",
        "weights": "random; encoder float32, decoder bfloat16",
        "seconds": round(time.perf_counter() - begin, 1),
        "peak_resident_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    } | figures
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps({name: value for name, value in summary.items() if name != "verify"}, indent=1))
    close = max(figures["features_max_abs_difference"], figures["logits_max_abs_difference"]) <= 1e-4
    return 0 if close and figures["greedy_tokens_identical"] else 1


if __name__ == "__main__":
    sys.exit(main())
