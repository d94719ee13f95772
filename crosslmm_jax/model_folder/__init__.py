"""The MODEL folder: all that is needed to run a model, in files that describe themselves.

contents            which files there are, checks, tokenizer files
settings            config.json and processor.json (`Processor`)
save, load          a whole folder; its weights
weights             parameters as safetensors files with an index
safetensors_file    one file, tensor by tensor
json_file           one JSON file
"""

from crosslmm_jax.model_folder.contents import (
    CONFIG_FILE,
    PROCESSOR_FILE,
    check_replaceable,
    content_digest,
    copy_tokenizer,
    find_model_folder,
    is_model_folder,
)
from crosslmm_jax.model_folder.json_file import read_json, write_json
from crosslmm_jax.model_folder.load import load_weights
from crosslmm_jax.model_folder.safetensors_file import FLOATS, Reader, Shape
from crosslmm_jax.model_folder.save import save_model_folder
from crosslmm_jax.model_folder.settings import (
    END_TOKENS,
    Generation,
    Processor,
    Resampling,
    load_model_config,
    load_processor,
    make_processor,
    processor_from_dict,
    write_settings,
)
from crosslmm_jax.model_folder.weights import (
    MAX_SHARD_BYTES,
    WeightsWriter,
    flatten,
    indexed_files,
    open_weights,
    parameter_shapes,
    read_index,
    unflatten,
    write_index,
)

__all__ = [
    "CONFIG_FILE", "END_TOKENS", "FLOATS", "Generation", "MAX_SHARD_BYTES", "PROCESSOR_FILE", "Processor",
    "Reader", "Resampling", "Shape", "WeightsWriter", "check_replaceable", "content_digest", "copy_tokenizer",
    "find_model_folder", "flatten", "indexed_files", "is_model_folder", "load_model_config",
    "load_processor", "load_weights", "make_processor", "open_weights", "parameter_shapes",
    "processor_from_dict", "read_index", "read_json", "save_model_folder", "unflatten", "write_index",
    "write_json", "write_settings",
]  # fmt: skip
