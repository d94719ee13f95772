"""`crosslmm convert from-hf`: weights of other projects to a MODEL folder."""

import contextlib
import dataclasses
import operator
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from crosslmm_jax.config import MergeConfig, ModelConfig, SamplingConfig, names_with_role
from crosslmm_jax.config_io import apply_overrides
from crosslmm_jax.convert.export_settings import export_folder, read_crosslmm_config
from crosslmm_jax.convert.parts import has_head, has_tower, head_differs
from crosslmm_jax.convert.plan import Plan, make_checkpoint, make_plan
from crosslmm_jax.convert.report import Report
from crosslmm_jax.convert.source.config import (
    Sizes,
    decoder_sizes,
    llava_sizes,
    llava_time_instruction,
    vision_sizes,
)
from crosslmm_jax.convert.source.files import Source, open_source
from crosslmm_jax.convert.source.processor import (
    ImageSettings,
    end_tokens,
    generation_of,
    image_settings,
    vocabulary_of,
    with_tokenizer_json,
)
from crosslmm_jax.convert.source.unreadable import check_readable
from crosslmm_jax.convert.source.unused import unused_fields
from crosslmm_jax.convert.stream import run_plan
from crosslmm_jax.errors import ConfigError, UserError
from crosslmm_jax.model_folder import (
    FLOATS,
    Processor,
    WeightsWriter,
    check_replaceable,
    copy_tokenizer,
    make_processor,
    write_settings,
)
from crosslmm_jax.presets import get_preset
from crosslmm_jax.utils import atomic_folder

SYSTEM_PROMPT = "You are a helpful assistant."
# Side of the grid of compact tokens without a preset or an override: the paper's 9 tokens per frame.
DEFAULT_GRID = 3
# Fields in which the preset and the source may differ: the image processor of the source gives mean and
# deviation, and layers have a check of their own.
_NOT_COMPARED = {"vision.image_mean", "vision.image_std", "vision.num_layers"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to convert: `llava`, `vision` and `llm`, or `crosslmm`; see `crosslmm convert from-hf --help`."""

    vision: str | None = None  # SigLIP folder or big_vision .npz; with `llava`, see `_open_sources`
    llm: str | None = None  # Qwen2 folder
    llava: str | None = None  # LLaVA folder, any layout
    projector: str | None = None  # `mm_projector.bin`
    crosslmm: str | None = None  # folder that `convert_to_hf` wrote, with its config and processor
    preset: str | None = None
    overrides: Sequence[str] = ()  # of fields of `ModelConfig`: "--merge.grid", "4"
    dtype: str | None = None  # of the result; None keeps that of each source
    seed: int = 0  # of parameters that are initialised

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in FLOATS:
            raise UserError(f"--dtype is {self.dtype!r}; choose one of {', '.join(FLOATS)}")
        if self.crosslmm is not None:
            self._check_alone()
            return
        one_folder = self.llava is not None and self.llm is None
        two_folders = self.llava is None and self.vision is not None and self.llm is not None
        if not one_folder and not two_folders:
            raise UserError(
                "give --vision with --llm, or --llava (with --vision for a tower that it lacks),"
                " or --crosslmm"
            )

    def _check_alone(self) -> None:
        names = ("vision", "llm", "llava", "projector", "preset")
        given = [f"--{name}" for name in names if getattr(self, name) is not None]
        given += [word.split("=")[0] for word in self.overrides if word.startswith("--")]
        if given:
            raise UserError(f"--crosslmm already has all weights and all settings; drop {', '.join(given)}")

    @property
    def sources(self) -> dict[str, str]:
        """Command-line option -> path, of all sources."""
        named = {
            "--llava": self.llava, "--llm": self.llm, "--projector": self.projector, "--vision": self.vision,
        }  # fmt: skip
        if self.crosslmm is not None:
            named["--crosslmm"] = str(export_folder(self.crosslmm))
        return {option: path for option, path in sorted(named.items()) if path is not None}


def convert_from_hf(request: Request, out: str | Path, *, tokenizer: str | Path | None = None) -> Report:
    """Converts weights to the MODEL folder `out`, which appears only when it is complete.

    Args:
      request: what to convert.
      out: an older MODEL folder there is replaced.
      tokenizer: the tokenizer's folder; None takes that of the language model.

    Raises:
      UserError: something does not fit; one message lists all keys and shapes that do not.
    """
    out = Path(out)
    check_replaceable(out)
    for option, path in request.sources.items():
        check_readable(option, path)
    named = Path(tokenizer or request.llm or request.llava or request.sources["--crosslmm"])
    with with_tokenizer_json(named) as tokenizer:
        vocabulary = vocabulary_of(tokenizer)
        planned = _planned(request, tokens=max(vocabulary.values()) + 1, tokenizer=named)
        with planned as (plan, processor), contextlib.ExitStack() as building:
            if request.crosslmm is None:
                source = _folder(request.llm or request.llava)
                ends, notes = end_tokens(source, vocabulary)
                generation, further = generation_of(source)
                processor = dataclasses.replace(processor, end_tokens=ends, generation=generation)
                plan.report.notes += notes + further
            folder = building.enter_context(atomic_folder(out, resume=False))
            write_settings(folder, plan.config, processor)
            copy_tokenizer(tokenizer, folder)
            tensors = {parameter.name: (parameter.shape, parameter.dtype) for parameter in plan.parameters}
            with WeightsWriter(folder, tensors, kind="np") as writer:
                run_plan(plan, writer, seed=request.seed)
        return plan.report


@contextlib.contextmanager
def _planned(
    request: Request, *, tokens: int = 0, tokenizer: Path | None = None
) -> Iterator[tuple[Plan, Processor]]:
    """The checked plan. Its sources are open inside the block."""
    with contextlib.ExitStack() as stack:
        opened = _open_sources(request, stack)
        config, processor, notes = _read_settings(request, opened)
        if "--vision" not in opened and request.llava is not None and not has_tower(opened["--llava"]):
            raise UserError(f"--llava {request.llava}: holds no vision tower; add --vision with its folder")
        if tokens > config.decoder.vocab_size:
            raise ConfigError(
                f"{tokenizer}: the tokenizer has {tokens} tokens, the embedding only"
                f" {config.decoder.vocab_size} rows; give the tokenizer that belongs to the language model"
            )
        replaced = "--projector" in opened
        checkpoints = [
            make_checkpoint(option, source, config, replaced=replaced and option == "--llava")
            for option, source in opened.items()
        ]
        plan = make_plan(config, checkpoints, dtype=request.dtype)
        plan.report.notes += notes
        yield plan, processor


def _open_sources(request: Request, stack: contextlib.ExitStack) -> dict[str, Source]:
    """Command-line option -> source of weights, open until `stack` closes.

    With a LLaVA checkpoint, the weights of `request.vision` are read only if that has no vision tower.
    """
    paths = request.sources
    opened = {
        option: stack.enter_context(open_source(path))
        for option, path in paths.items()
        if option != "--vision" or request.llava is None
    }
    if request.llava is not None and request.vision is not None and not has_tower(opened["--llava"]):
        opened["--vision"] = stack.enter_context(open_source(request.vision))
    return opened


class _Settings(NamedTuple):
    """Both settings of the MODEL folder, and notes about where they come from."""

    config: ModelConfig
    processor: Processor
    notes: list[str]


def _read_settings(request: Request, opened: dict[str, Source]) -> _Settings:
    if request.crosslmm is not None:
        config, processor = read_crosslmm_config(export_folder(request.crosslmm))
        notes, settings_file = [], "the export's config.json"
    else:
        config, settings, notes = read_config(request, opened)
        llava = None if request.llava is None else _folder(request.llava)
        processor = make_processor(
            config, sampling=SamplingConfig(), system_prompt=SYSTEM_PROMPT, resampling=settings.resampling,
            time_instruction="none" if llava is None else llava_time_instruction(llava),
        )  # fmt: skip
        settings_file = settings.source
        if llava is not None and request.vision is not None and "--vision" not in opened:
            notes.append("--vision gives sizes and image settings only: --llava has a vision tower")
        for option in ("--llava", "--llm", "--vision"):
            fields = unused_fields(_folder(request.sources[option])) if option in opened else ()
            if fields:
                notes.append(f"fields of {option}'s config.json that are not used: {', '.join(fields)}")
    notes.append(f"{processor.resampling} resampling of frames, from {settings_file}")
    if processor.time_instruction != "none":
        kind = processor.time_instruction
        notes.append(f"{kind} time instruction about each video, from the source's config.json")
    return _Settings(config, processor, notes)


def read_config(request: Request, opened: dict[str, Source]) -> tuple[ModelConfig, ImageSettings, list[str]]:
    """The model's config, from the sources' config.json, the preset and the overrides, in this order.

    Also the settings of the image processor, and notes.

    Raises:
      UserError: a value is missing, cannot be converted, or differs from the preset.
    """
    preset = get_preset(request.preset) if request.preset is not None else None
    sizes, notes = _read_sizes(request, opened, preset), []
    if sizes.decoder.tie_embeddings and head_differs(opened["--llm" if "--llm" in opened else "--llava"]):
        sizes = Sizes(sizes.vision, dataclasses.replace(sizes.decoder, tie_embeddings=False))
        notes.append(
            "lm_head.weight differs from the embedding, to which config.json says that it is tied; both are"
            " kept, as transformers does"
        )
    settings = _image_settings(request, sizes.vision.image_size)
    vision = dataclasses.replace(sizes.vision, image_mean=settings.mean, image_std=settings.std)
    decoder = sizes.decoder
    if preset is None:
        merge = MergeConfig(grid=min(DEFAULT_GRID, vision.grid))
        config = ModelConfig(vision=vision, merge=merge, decoder=decoder)
    else:
        _check_preset(str(request.preset), preset, Sizes(vision, decoder))
        vision = dataclasses.replace(
            preset.vision, num_layers=vision.num_layers, feature_layer=vision.feature_layer,
            image_mean=vision.image_mean, image_std=vision.image_std,
        )  # fmt: skip
        decoder = dataclasses.replace(
            preset.decoder, max_positions=decoder.max_positions, yarn_factor=decoder.yarn_factor,
            yarn_trained_positions=decoder.yarn_trained_positions,
        )  # fmt: skip
        config = dataclasses.replace(preset, vision=vision, decoder=decoder)
    if request.overrides:
        config = apply_overrides(config, request.overrides, source="convert from-hf")
    return config, settings, notes


def _read_sizes(request: Request, opened: dict[str, Source], preset: ModelConfig | None) -> Sizes:
    if request.llava is not None:
        sized = request.vision is not None and Path(request.vision).suffix != ".npz"
        tower = vision_sizes(_folder(request.vision)) if sized else None
        return llava_sizes(_folder(request.llava), has_head=has_head(opened["--llava"]), tower=tower)
    decoder = decoder_sizes(_folder(request.llm))
    if Path(str(request.vision)).suffix != ".npz":
        return Sizes(vision_sizes(_folder(request.vision)), decoder)
    if preset is None:
        raise UserError(f"{request.vision}: a big_vision file does not say its sizes; add --preset")
    return Sizes(preset.vision, decoder)


def _folder(path: str | None) -> Path:
    return Path(str(path)) if Path(str(path)).is_dir() else Path(str(path)).parent


def _image_settings(request: Request, image_size: int) -> ImageSettings:
    """Settings of the image processor, from the folder of the vision tower."""
    path = request.llava if request.vision is None else request.vision
    if Path(str(path)).suffix == ".npz":
        return ImageSettings(resampling="bilinear", source="big_vision's own images")
    return image_settings(_folder(path), image_size)


def _check_preset(name: str, preset: ModelConfig, sizes: Sizes) -> None:
    """Raises a `ConfigError` that lists every size of the source that differs from the preset."""
    theirs, ours = sizes.decoder, preset.decoder
    compared = [
        (field, operator.attrgetter(field)(sizes), operator.attrgetter(field)(preset))
        for field in names_with_role(ModelConfig, "architecture")
        if field not in _NOT_COMPARED
    ]
    compared += [
        ("vision.depth (layers up to its features)", sizes.vision.depth, preset.vision.depth),
        # Extra rows of the vocabulary are dropped.
        ("decoder.vocab_size", min(theirs.vocab_size, ours.vocab_size), ours.vocab_size),
    ]
    different = [
        f"{name} is {found}, the preset's is {wanted}" for name, found, wanted in compared if found != wanted
    ]
    if different:
        raise ConfigError(
            f"--preset {name} does not fit the source: {'; '.join(different)}; leave --preset out"
        )
