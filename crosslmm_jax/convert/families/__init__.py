"""One table of parameters per family of models: which tensor of theirs is which of ours.

siglip    the vision tower: Hugging Face's names and big_vision's
qwen2     the decoder
llava     the projector, and the names of all three layouts of a whole checkpoint
cross     what only CrossLMM has: V2V, T2V, gates
"""

from crosslmm_jax.convert.families import cross, llava, qwen2, siglip

__all__ = ["cross", "llava", "qwen2", "siglip"]
