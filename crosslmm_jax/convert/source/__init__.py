"""Other projects' checkpoints as they are on disk.

config       sizes, from config.json
files        tensors: safetensors, .bin, .npz
processor    image processor settings, tokenizer files
"""

from crosslmm_jax.convert.source import config, files, processor

__all__ = ["config", "files", "processor"]
