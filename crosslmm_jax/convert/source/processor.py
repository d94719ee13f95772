"""Image processor settings and tokenizer files of a source."""

import contextlib
import dataclasses
import json
import operator
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from crosslmm_jax.config_io import from_dict
from crosslmm_jax.convert.source.checks import Json, is_number
from crosslmm_jax.errors import ConfigError, UserError
from crosslmm_jax.model_folder import END_TOKENS, Generation, Resampling, read_json
from crosslmm_jax.utils import cannot_read

# PIL's number, as Hugging Face writes it -> our name.
RESAMPLING: dict[int, Resampling] = {3: "bicubic", 2: "bilinear"}
# Fields of generation_config.json that are read elsewhere, follow from the tokenizer, or say who wrote it.
_NOT_OF_SAMPLING = (
    "eos_token_id", "bos_token_id", "pad_token_id", "transformers_version", "_from_model_config"
)  # fmt: skip
# Special tokens of prompts.
NEEDED_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>")


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """How an image is resized and normalised."""

    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resampling: Resampling = "bicubic"
    source: str = "the defaults of SiglipImageProcessor, since no preprocessor_config.json is there"


def image_settings(folder: Path | None, image_size: int) -> ImageSettings:
    """Settings from `preprocessor_config.json`, or `processor_config.json` of newer checkpoints.

    Raises:
      UserError: the file is damaged, its size is not the vision tower's, or it needs something that this
        project does not support.
    """
    if folder is None or not folder.is_dir():
        return ImageSettings()
    path, settings = folder / "preprocessor_config.json", None
    if path.is_file():
        settings = read_json(path)
    elif (folder / "processor_config.json").is_file():
        path = folder / "processor_config.json"
        settings = read_json(path).get("image_processor")
    if not settings:
        return ImageSettings()
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: field image_processor is {settings!r}; it must be an object")
    _check(settings, path, image_size)
    mean, std = settings.get("image_mean", [0.5] * 3), settings.get("image_std", [0.5] * 3)
    for name, value in (("image_mean", mean), ("image_std", std)):
        numbers = isinstance(value, list) and len(value) == 3 and all(is_number(x) for x in value)
        if not numbers or (name == "image_std" and min(value) <= 0):
            above = " above 0" if name == "image_std" else ""
            raise ConfigError(f"{path}: field {name} is {value!r}; it must be three numbers{above}")
    return ImageSettings(
        tuple(float(x) for x in mean), tuple(float(x) for x in std),
        RESAMPLING[settings.get("resample", 3)], path.name,
    )  # fmt: skip


def _check(settings: Json, path: Path, image_size: int) -> None:
    resample = settings.get("resample", 3)
    if type(resample) is not int or resample not in RESAMPLING:
        raise ConfigError(f"{path}: field resample is {resample!r}; it must be 3 (bicubic) or 2 (bilinear)")
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if settings.get(name, True) is not True:
            raise ConfigError(f"{path}: field {name} is {settings[name]!r}; it must be true")
    if settings.get("do_center_crop") not in (None, False):
        raise ConfigError(
            f"{path}: field do_center_crop is {settings['do_center_crop']!r}; it must be false: whole"
            " frames are resized"
        )
    factor = settings.get("rescale_factor", 1 / 255)
    if not is_number(factor) or abs(factor * 255 - 1) > 1e-6:
        raise ConfigError(f"{path}: field rescale_factor is {factor!r}; it must be 1/255")
    size = settings.get("size")
    wanted = {"height": image_size, "width": image_size}
    if type(size) is int:  # older checkpoints write one number for both sides
        size = {"height": size, "width": size}
    if size is not None and size != wanted:
        raise ConfigError(f"{path}: field size is {size!r}, but the tower reads {wanted}; fix one of them")


@contextlib.contextmanager
def with_tokenizer_json(folder: Path) -> Iterator[Path]:
    """`folder`, or a converted copy of it if it holds an older tokenizer (vocab.json, merges.txt).

    Raises:
      UserError: transformers cannot read it.
    """
    older = all((folder / name).is_file() for name in ("vocab.json", "merges.txt", "tokenizer_config.json"))
    if not older or (folder / "tokenizer.json").is_file():
        yield folder
        return
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as converted:
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, use_fast=True)
            tokenizer.save_pretrained(converted)
        except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
            raise UserError(f"{folder}: the tokenizer cannot be read ({error}); copy it again") from error
        yield Path(converted)


def read_vocabulary(folder: Path) -> dict[str, int]:
    """All tokens of a tokenizer.json and their ids. Raises a UserError if it is damaged."""
    path = folder / "tokenizer.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = dict(described["model"]["vocab"])
        vocabulary |= {token["content"]: token["id"] for token in described["added_tokens"]}
        return {text: operator.index(token) for text, token in vocabulary.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise cannot_read(path, f"cannot be read ({error!r}); copy it again") from error


def vocabulary_of(folder: Path) -> dict[str, int]:
    """All tokens of a tokenizer folder and their ids.

    Raises:
      UserError: it is no tokenizer folder, or lacks special tokens of prompts.
    """
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {name} is missing; give a tokenizer's folder with --tokenizer")
    vocabulary = read_vocabulary(folder)
    missing = [token for token in NEEDED_TOKENS if token not in vocabulary]
    if missing:
        raise UserError(
            f"{folder}: the tokenizer has no {', '.join(missing)}; give that of a Qwen2.5 chat model with"
            " --tokenizer (Qwen2's ids are the same)"
        )
    return vocabulary


def generation_of(folder: Path) -> tuple[Generation, list[str]]:
    """What generation_config.json says about drawing tokens, and notes about it.

    Raises:
      UserError: it is damaged, or one of these fields has a wrong type.
    """
    path = folder / "generation_config.json"
    stored = {name: value for name, value in _stored(path).items() if value is not None}
    names = [field.name for field in dataclasses.fields(Generation)]
    said = {name: stored[name] for name in names if name in stored}
    generation = from_dict(Generation, dict.fromkeys(names) | said, source=path)
    notes = []
    if said:
        listed = ", ".join(f"{name} {json.dumps(value)}" for name, value in said.items())
        notes.append(
            f"sampling in generation_config.json ({listed}) is kept for `convert to-hf`; answers are greedy"
            " unless --temperature asks for sampling"
        )
    further = [name for name in stored if name not in (*names, *_NOT_OF_SAMPLING)]
    if further:
        notes.append(f"left out of generation_config.json: {', '.join(further)}")
    return generation, notes


def _stored(path: Path) -> Json:
    return read_json(path) if path.is_file() else {}


def end_tokens(folder: Path, vocabulary: Mapping[str, int]) -> tuple[tuple[str, ...], list[str]]:
    """The tokens that end an answer, and notes about where they come from.

    Those of every Qwen2.5 chat model, which end a turn and a text, and what generation_config.json adds.

    Args:
      folder: of the language model.
      vocabulary: of its tokenizer.

    Raises:
      UserError: generation_config.json is damaged, or its eos_token_id is no id and no list of ids.
    """
    path = folder / "generation_config.json"
    ids = _stored(path).get("eos_token_id")
    listed = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if any(type(token) is not int or token < 0 for token in listed):
        raise ConfigError(f"{path}: field eos_token_id is {ids!r}; it must be an id or a list of ids")
    texts = {token: text for text, token in vocabulary.items()}
    unknown = [token for token in listed if token not in texts]
    found = tuple(dict.fromkeys([*END_TOKENS, *(texts[token] for token in listed if token in texts)]))
    notes = []
    if len(found) > len(END_TOKENS):
        further = " and ".join(found[len(END_TOKENS) :])
        notes.append(f"end tokens of answers, from generation_config.json: also {further}")
    if unknown:
        notes.append(
            f"eos_token_id {', '.join(map(str, unknown))} of generation_config.json is left out: the"
            " tokenizer has no such token"
        )
    return found, notes
