"""TODO."""

from crosslmm_jax.model_folder.folder import (
    CONFIG_FILE,
    PROCESSOR_FILE,
    Processor,
    check_replaceable,
    copy_tokenizer,
    is_model_folder,
    load_model_config,
    load_processor,
    load_weights,
    make_processor,
    save_model_folder,
    write_json,
    write_settings,
)
from crosslmm_jax.model_folder.safetensors_file import Reader, Writer
from crosslmm_jax.model_folder.weights import (
    INDEX_FILE,
    MAX_SHARD_BYTES,
    check_tensors,
    files_of,
    flatten,
    plan_shards,
    unflatten,
)

__all__ = [
    "CONFIG_FILE",
    "INDEX_FILE",
    "MAX_SHARD_BYTES",
    "PROCESSOR_FILE",
    "Processor",
    "Reader",
    "Writer",
    "check_replaceable",
    "check_tensors",
    "copy_tokenizer",
    "files_of",
    "flatten",
    "is_model_folder",
    "load_model_config",
    "load_processor",
    "load_weights",
    "make_processor",
    "plan_shards",
    "save_model_folder",
    "unflatten",
    "write_json",
    "write_settings",
]
