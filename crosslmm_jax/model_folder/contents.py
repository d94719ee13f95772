"""The files of a MODEL folder: which there must be, and what may be replaced.

| file | contents |
|---|---|
| config.json | `ModelConfig` |
| processor.json | `Processor`: how frames and prompts are made |
| model.safetensors | weights under our parameter names, joined by "."; or shards and an index |
| tokenizer.json, tokenizer_config.json, ... | the tokenizer, also for `AutoTokenizer` |
"""

import hashlib
import os
import shlex
import shutil
from pathlib import Path

from crosslmm_jax.errors import UserError
from crosslmm_jax.model_folder.json_file import read_json
from crosslmm_jax.model_folder.weights import INDEX_FILE, SINGLE_FILE, weight_files
from crosslmm_jax.utils import check_local, guess_meant, is_vacant

CONFIG_FILE = "config.json"
PROCESSOR_FILE = "processor.json"
# What a digest of a file reads of it: a file of up to a megabyte is read whole.
_SAMPLES, _SAMPLE_BYTES = 64, 16_384
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def _missing(folder: Path) -> list[str]:
    """Required files that are not there; those of the tokenizer aside."""
    weights = INDEX_FILE if (folder / INDEX_FILE).is_file() else SINGLE_FILE
    return [name for name in (CONFIG_FILE, PROCESSOR_FILE, weights) if not (folder / name).is_file()]


def is_model_folder(folder: str | Path) -> bool:
    """Whether `folder` has the files of a MODEL folder. They may still be damaged."""
    return not _missing(Path(folder))


def _is_of_hugging_face(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() and "model_type" in read_json(folder / CONFIG_FILE)


def check_model_folder(folder: str | Path) -> None:
    """Raises a `UserError` that lists the files `folder` lacks."""
    check_local(folder)
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; give a MODEL folder, as `crosslmm train` writes{guess_meant(folder)}"
        )
    missing = _missing(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        missing.append("tokenizer.json")
    if PROCESSOR_FILE in missing and _is_of_hugging_face(folder):
        raise UserError(
            f"{folder}: is a checkpoint of Hugging Face; make a MODEL folder of it with `crosslmm convert"
            " from-hf`"
        )
    if missing:
        raise UserError(f"{folder}: lacks {', '.join(missing)}; give a complete MODEL folder")


def find_model_folder(folder: str | Path) -> Path:
    """`folder` if it is a MODEL folder, or the MODEL folder in it if it is a run's.

    Raises:
      UserError: it is a run's and has no MODEL folder yet.
    """
    check_local(folder)
    folder = Path(folder)
    if (folder / CONFIG_FILE).exists():
        return folder
    if (folder / "model" / CONFIG_FILE).exists():
        return folder / "model"
    if (folder / "checkpoints").is_dir():
        raise UserError(
            f"{folder}: this run has written no MODEL folder yet; make one from its newest checkpoint with"
            f" `crosslmm export {shlex.quote(str(folder))}`"
        )
    return folder


def content_digest(folder: str | Path) -> str:
    """A hash of the config and the weights of a MODEL folder. Raises a `UserError` when files are missing.

    Of a large file it covers the size and samples: two trainings differ nearly everywhere.
    """
    check_model_folder(folder)
    digest = hashlib.blake2b(digest_size=12)
    for path in [Path(folder) / CONFIG_FILE, *weight_files(Path(folder))]:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{size} ".encode())
            for part in range(_SAMPLES):
                file.seek(part * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def check_replaceable(folder: str | Path) -> None:
    """Raises a `UserError` when `folder` exists and is neither empty nor a MODEL folder."""
    if not is_model_folder(folder) and not is_vacant(Path(folder)):
        raise UserError(f"{folder}: exists and is no MODEL folder; it is left alone: give another name")


def copy_tokenizer(tokenizer_folder: str | Path, folder: Path) -> None:
    """Copies the tokenizer files into `folder`. Raises a `UserError` when there are none."""
    names = [name for name in _TOKENIZER_FILES if (Path(tokenizer_folder) / name).is_file()]
    if not {"tokenizer.json", "vocab.json"} & set(names):
        raise UserError(f"{tokenizer_folder}: has no tokenizer.json or vocab.json; give a tokenizer's folder")
    for name in names:
        shutil.copyfile(Path(tokenizer_folder) / name, folder / name)
