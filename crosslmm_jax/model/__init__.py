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

from crosslmm_jax.model.attention import attention
from crosslmm_jax.model.cache import Cache
from crosslmm_jax.model.crosslmm import CrossLMM, reads_of
from crosslmm_jax.model.decoder_layer import SequenceReads
from crosslmm_jax.model.initialise import copy_cross_attention, init_params, logical_axes, quantised_axes
from crosslmm_jax.model.quantise import quantise_params
from crosslmm_jax.model.vision import Visual
from crosslmm_jax.model.weights import is_decayed, separate_layers

__all__ = [
    "Cache", "CrossLMM", "SequenceReads", "Visual", "attention", "copy_cross_attention", "init_params",
    "is_decayed", "logical_axes", "quantise_params", "quantised_axes", "reads_of", "separate_layers",
]  # fmt: skip
