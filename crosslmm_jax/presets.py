"""The released sizes, and `tiny` for CPUs.

Numbers are from the config.json files of the checkpoints: SigLIP2 (so400m-patch14-384, giant-opt-patch16-384)
and Qwen2.5-Instruct (0.5B, 1.5B, 7B).
"""

from collections.abc import Callable

from crosslmm_jax.config import (
    CrossAttentionConfig,
    DecoderConfig,
    MergeConfig,
    ModelConfig,
    VisionConfig,
)
from crosslmm_jax.errors import ConfigError


def so400m() -> VisionConfig:
    """SigLIP2 so400m-patch14-384: 27 x 27 = 729 patches per frame."""
    return VisionConfig(
        image_size=384, patch_size=14, width=1152, num_layers=27, num_heads=16, mlp_width=4304
    )


def giant_opt() -> VisionConfig:
    """SigLIP2 giant-opt-patch16-384: 24 x 24 = 576 patches per frame."""
    return VisionConfig(
        image_size=384, patch_size=16, width=1536, num_layers=40, num_heads=16, mlp_width=6144
    )


def _qwen(
    *, width: int, num_layers: int, num_heads: int, num_kv_heads: int, head_dim: int, mlp_width: int,
    vocab_size: int, tie_embeddings: bool,
) -> DecoderConfig:  # fmt: skip
    return DecoderConfig(
        vocab_size=vocab_size, width=width, num_layers=num_layers, num_heads=num_heads,
        num_kv_heads=num_kv_heads, head_dim=head_dim, mlp_width=mlp_width, rope_theta=1e6,
        rms_norm_eps=1e-6, tie_embeddings=tie_embeddings, max_positions=32768,
    )  # fmt: skip


def crosslmm_0_5b() -> ModelConfig:
    """SigLIP2-so400m + Qwen2.5-0.5B, 9 tokens per frame."""
    decoder = _qwen(
        width=896, num_layers=24, num_heads=14, num_kv_heads=2, head_dim=64, mlp_width=4864,
        vocab_size=151936, tie_embeddings=True,
    )  # fmt: skip
    return ModelConfig(vision=so400m(), merge=MergeConfig(grid=3), decoder=decoder)


def crosslmm_2b() -> ModelConfig:
    """The paper's 2B: SigLIP2-so400m + Qwen2.5-1.5B, 9 tokens per frame."""
    decoder = _qwen(
        width=1536, num_layers=28, num_heads=12, num_kv_heads=2, head_dim=128, mlp_width=8960,
        vocab_size=151936, tie_embeddings=True,
    )  # fmt: skip
    return ModelConfig(vision=so400m(), merge=MergeConfig(grid=3), decoder=decoder)


def _qwen_7b() -> DecoderConfig:
    return _qwen(
        width=3584, num_layers=28, num_heads=28, num_kv_heads=4, head_dim=128, mlp_width=18944,
        vocab_size=152064, tie_embeddings=False,
    )  # fmt: skip


def crosslmm_7b() -> ModelConfig:
    """The paper's 7B: SigLIP2-so400m + Qwen2.5-7B, 9 tokens per frame."""
    return ModelConfig(vision=so400m(), merge=MergeConfig(grid=3), decoder=_qwen_7b())


def crosslmm_7b_vitg() -> ModelConfig:
    """The paper's 7B with the giant encoder and 16 tokens per frame."""
    return ModelConfig(vision=giant_opt(), merge=MergeConfig(grid=4), decoder=_qwen_7b())


def tiny() -> ModelConfig:
    """All of the model at a size that trains on two CPU cores in a minute."""
    return ModelConfig(
        vision=VisionConfig(
            image_size=32, patch_size=8, width=48, num_layers=3, num_heads=4, mlp_width=96, frame_chunk=256
        ),
        merge=MergeConfig(grid=1),
        decoder=DecoderConfig(
            vocab_size=512, width=64, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, mlp_width=128,
            rope_theta=1e4, rms_norm_eps=1e-6, tie_embeddings=True, max_positions=2048, remat=False,
        ),
        cross_attention=CrossAttentionConfig(cross_attn_every=2, gate_init=0.5),
        compute_dtype="float32",
    )  # fmt: skip


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "tiny": tiny,
    "crosslmm_0.5b": crosslmm_0_5b,
    "crosslmm_2b": crosslmm_2b,
    "crosslmm_7b": crosslmm_7b,
    "crosslmm_7b_vitg": crosslmm_7b_vitg,
}


def get_preset(name: str) -> ModelConfig:
    """Returns the `ModelConfig` called `name`; raises `ConfigError` with the known names otherwise."""
    if name not in PRESETS:
        raise ConfigError(f"--preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]()
