"""Attention: one function with several backends, which are tested against one definition.

- `dispatch`: `attention`, the choice of its backend, and the backends that are plain JAX.
- `blockwise`: blocks with an online softmax, on every platform.
- `cudnn`: cuDNN's fused kernels, with split-K where few queries read many keys.
- `mosaic`, `mosaic_kernel`: a kernel for Hopper GPUs and the encoder's heads of 72.
- `splash`: JAX's kernel for TPUs.
- `context_parallel`: attention to frames that are sharded over devices.
- `video_attention`: attention to the original tokens, for a long video in chunks.
"""

from crosslmm_jax.model.attention.dispatch import Backend, attention, reference_attention

__all__ = ["Backend", "attention", "reference_attention"]
