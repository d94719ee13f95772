"""Hugging Face weights in and out of a MODEL folder.

from_hf, to_hf             the two commands; plan and stream are steps of the first
rules, families            tables of parameters, one per family of models
source                     other projects' files: tensors, sizes, image processor, tokenizer
export_settings            the JSON files of an export
report                     where every tensor went
verify, verify_source      a conversion against its source, block by block
torch_reference            CrossLMM in PyTorch; `to-hf` copies it into exports
"""

from crosslmm_jax.convert.from_hf import Request, convert_from_hf
from crosslmm_jax.convert.to_hf import convert_to_hf
from crosslmm_jax.convert.verify import verify

__all__ = [
    "Request", "convert_from_hf", "convert_to_hf", "verify",
]  # fmt: skip
