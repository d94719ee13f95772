"""The model: pure modules and functions, frames and tokens to logits.

Glossary of shape letters, the same in names, einsums and docstrings:

| letter | meaning |
|---|---|
| `B` | batch |
| `F` | frames of a row |
| `P` | patches a frame, before pooling |
| `C` | compact tokens a frame, after pooling |
| `T` | query tokens |
| `S` | key and value tokens |
| `D` | decoder width |
| `W` | vision width |
| `N` | query heads |
| `K` | key and value heads |
| `G` | query heads a key head, N / K |
| `H` | head size |
| `M` | MLP width |
| `V` | vocabulary |

The paper's K, "cross-attention every K layers", is `cross_attn_every`.
"""

from crosslmm_jax.model.attention.dispatch import attention
from crosslmm_jax.model.cross_attention import KeysValues
from crosslmm_jax.model.crosslmm import CrossLMM
from crosslmm_jax.model.encode_frames import Visual, frame_chunk
from crosslmm_jax.model.encoder import SiglipEncoder, encoder_layer, patchify
from crosslmm_jax.model.kv_cache import Cache
from crosslmm_jax.model.loss import logits_of
from crosslmm_jax.model.ops import rms_norm
from crosslmm_jax.model.params.initialise import (
    COPIED,
    copy_cross_attention,
    init_params,
    logical_axes,
    quantised_axes,
)
from crosslmm_jax.model.params.tables import has_own_dtype, is_decayed, separate_layers
from crosslmm_jax.model.pooler import Pooler
from crosslmm_jax.model.quantisation.quantise import DTYPES, quantise_params
from crosslmm_jax.model.qwen2 import mlp, self_attention

__all__ = [
    "COPIED",
    "Cache",
    "CrossLMM",
    "DTYPES",
    "KeysValues",
    "Pooler",
    "SiglipEncoder",
    "Visual",
    "attention",
    "copy_cross_attention",
    "encoder_layer",
    "frame_chunk",
    "has_own_dtype",
    "init_params",
    "is_decayed",
    "logical_axes",
    "logits_of",
    "mlp",
    "patchify",
    "quantise_params",
    "quantised_axes",
    "rms_norm",
    "self_attention",
    "separate_layers",
]
