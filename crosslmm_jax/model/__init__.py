"""The model: frames and tokens in, logits out, as pure functions and four Flax modules.

    crosslmm.py              CrossLMM: the modules together; loss, encode, prefill, append, extend, observe
    encoder.py               SiglipEncoder (module): frames to features
    pooler.py                Pooler (module): token merge and projector, features to compact tokens
    encode_frames.py         the way from frames to compact and original tokens, in chunks
    decoder.py               Decoder (module): layers over a prompt, over frames or text after a KV cache
    qwen2.py                 self-attention and MLP of a decoder layer
    layer_loops.py           the loops over the decoder's layers: scanned, and one by one
    dual_cross_attention.py  DualCrossAttention (module): V2V and T2V
    kv_cache.py              what generation keeps
    loss.py, ops.py          loss and head; norms, rotary embedding, products
    flops.py                 FLOPs of each part, counted from the sizes
    attention/               one attention function and its backends
    params/                  tables of parameters, initial values, logical axes, LoRA's adapters
    quantisation/            8-bit matrices

Modules are Flax Linen for one reason: parameters are a plain nested dict. Each module declares its own from
one table (`params/tables.py`) and Linen binds them by path, so converters, checkpoints and shardings see
arrays under names and nothing else. The scan over layers and rematerialisation are jax's, `jax.lax.scan` and
`jax.checkpoint`, not Linen's.

Shape letters, the same in names, einsums and docstrings:

| letter | meaning |
|---|---|
| `B` | batch |
| `F` | frames per row |
| `P` | patches per frame, before pooling |
| `C` | compact tokens per frame, after pooling |
| `T` | query tokens |
| `S` | key and value tokens |
| `D` | decoder width |
| `W` | vision width |
| `N` | query heads |
| `K` | key and value heads |
| `G` | query heads per key head, N / K |
| `H` | head size |
| `M` | MLP width |
| `V` | vocabulary |
| `R` | pixels per side of a frame |
| `X` | decoder layers with cross-attention |
| `U` | T tokens and padding, U >= T |

The paper's K, "cross-attention every K layers", is `cross_attn_every`.
"""

from crosslmm_jax.model import flops
from crosslmm_jax.model.attention.dispatch import ChosenBackend, attention, attention_backends
from crosslmm_jax.model.crosslmm import CrossLMM, apply
from crosslmm_jax.model.dual_cross_attention import kv_width
from crosslmm_jax.model.encode_frames import Visual, encoder_frame_bytes, frame_chunk
from crosslmm_jax.model.encoder import SiglipEncoder, encoder_layer, patchify
from crosslmm_jax.model.kv_cache import KeysValues, KVCache, VideoCache
from crosslmm_jax.model.loss import LOGITS_AT_ONCE, Scores, logits_of
from crosslmm_jax.model.ops import rms_norm
from crosslmm_jax.model.params.initialise import (
    COPIED,
    adapted_matrices,
    adapter_axes,
    copy_cross_attention,
    init_adapters,
    init_params,
    logical_axes,
    quantised_axes,
)
from crosslmm_jax.model.params.low_rank import Adapted, LowRank, merge_adapters, without_adapters
from crosslmm_jax.model.params.tables import Params, cast, has_own_dtype, is_decayed, separate_layers
from crosslmm_jax.model.pooler import Pooler
from crosslmm_jax.model.quantisation.quantise import DTYPES, quantise_params
from crosslmm_jax.model.qwen2 import mlp, self_attention

__all__ = [
    "Adapted", "COPIED", "ChosenBackend", "CrossLMM", "DTYPES", "KVCache", "KeysValues", "LOGITS_AT_ONCE",
    "LowRank", "Params", "Pooler", "Scores", "SiglipEncoder", "VideoCache", "Visual", "adapted_matrices",
    "adapter_axes", "apply", "attention", "attention_backends", "cast", "copy_cross_attention",
    "encoder_frame_bytes", "encoder_layer", "flops", "frame_chunk", "has_own_dtype", "init_adapters",
    "init_params", "is_decayed", "kv_width", "logical_axes", "logits_of", "merge_adapters", "mlp",
    "patchify", "quantise_params", "quantised_axes", "rms_norm", "self_attention", "separate_layers",
    "without_adapters",
]  # fmt: skip
