"""`crosslmm convert from-hf`: weights of other projects to a MODEL folder, or straight onto a mesh."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from crosslmm_jax.config import DecoderConfig, MergeConfig, ModelConfig, SamplingConfig, VisionConfig
from crosslmm_jax.config_io import apply_overrides
from crosslmm_jax.convert.hf_config import (
    Sizes,
    decoder_sizes,
    llava_sizes,
    llava_time_instruction,
    vision_sizes,
)
from crosslmm_jax.convert.hf_export import export_folder, read_crosslmm_config
from crosslmm_jax.convert.hf_files import FLOATS, Source, open_source
from crosslmm_jax.convert.hf_processor import (
    ImageSettings,
    image_settings,
    tokenizer_size,
    with_tokenizer_json,
)
from crosslmm_jax.convert.llava import canonical
from crosslmm_jax.convert.plan import Plan, make_checkpoint, make_plan
from crosslmm_jax.convert.report import Report
from crosslmm_jax.convert.rules import shapes_of
from crosslmm_jax.convert.stream import DeviceSink, FileSink, run_plan
from crosslmm_jax.errors import ConfigError, UserError
from crosslmm_jax.model_folder import (
    Processor,
    check_replaceable,
    copy_tokenizer,
    make_processor,
    write_settings,
)
from crosslmm_jax.presets import get_preset
from crosslmm_jax.utils import atomic_folder

SYSTEM_PROMPT = "You are a helpful assistant."
# Compact tokens along a side where neither a preset nor the user says: the paper's 9 tokens a frame.
DEFAULT_GRID = 3
# What the preset and the source may differ in: not of the weights, or settled elsewhere.
_NOT_COMPARED = {"num_layers", "feature_layer", "image_mean", "image_std", "post_layernorm", "frame_chunk",
                 "keep_features", "max_positions", "remat", "vocab_size"}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to convert: `llava`, `vision` and `llm`, or `crosslmm`; see `crosslmm convert from-hf --help`."""

    vision: str | None = None  # SigLIP folder or big_vision .npz; with `llava`, only for its sizes
    llm: str | None = None
    llava: str | None = None
    projector: str | None = None
    crosslmm: str | None = None  # folder that `convert_to_hf` wrote; brings its config and processor
    preset: str | None = None
    overrides: Sequence[str] = ()  # of fields of `ModelConfig`: "--merge.grid", "4"
    dtype: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in FLOATS:
            raise UserError(f"--dtype is {self.dtype!r}; choose one of {', '.join(FLOATS)}")
        if self.crosslmm is not None:
            self._check_alone()
            return
        whole = self.llava is not None and self.llm is None
        parts = self.llava is None and self.vision is not None and self.llm is not None
        if not whole and not parts:
            raise UserError(
                "give --vision with --llm, or --llava (with --vision only for the tower's sizes), or"
                " --crosslmm"
            )

    def _check_alone(self) -> None:
        names = ("vision", "llm", "llava", "projector", "preset")
        given = [f"--{name}" for name in names if getattr(self, name) is not None]
        given += [word.split("=")[0] for word in self.overrides if word.startswith("--")]
        if given:
            raise UserError(f"--crosslmm brings all weights and all settings; drop {', '.join(given)}")

    @property
    def sources(self) -> dict[str, str]:
        """Option -> path of the sources that hold weights."""
        named = {"--llava": self.llava, "--llm": self.llm, "--projector": self.projector}
        if self.crosslmm is not None:
            named["--crosslmm"] = str(export_folder(self.crosslmm))
        if self.llava is None:
            named["--vision"] = self.vision
        return {option: path for option, path in sorted(named.items()) if path is not None}


def convert_from_hf(request: Request, out: str | Path, *, tokenizer: str | Path | None = None) -> Report:
    """Writes the MODEL folder `out`, under another name until it is complete.

    Args:
      request: what to convert.
      out: an older MODEL folder there is replaced.
      tokenizer: its folder; None: that of the language model.

    Raises:
      UserError: anything that does not fit; a message names all keys and shapes that do not.
    """
    out = Path(out)
    check_replaceable(out)
    named = Path(tokenizer or request.llm or request.llava or request.sources["--crosslmm"])
    with with_tokenizer_json(named) as tokenizer:
        planned = _planned(request, tokens=tokenizer_size(tokenizer), tokenizer=named)
        with planned as (plan, processor), atomic_folder(out, resume=False) as folder:
            write_settings(folder, plan.config, processor)
            copy_tokenizer(tokenizer, folder)
            tensors = {leaf.name: (leaf.shape, leaf.dtype) for leaf in plan.leaves}
            with FileSink(folder, tensors, kind="np") as sink:
                run_plan(plan, sink, seed=request.seed)
        return plan.report


def load_from_hf(request: Request, make_shardings: Any) -> tuple[ModelConfig, dict[str, Any], Report]:
    """The converted parameters on devices, without a folder in between.

    Args:
      request: what to convert.
      make_shardings: `ModelConfig` -> tree of shardings like the parameters.

    Raises:
      UserError: as `convert_from_hf`.
    """
    with _planned(request) as (plan, _):
        sink = DeviceSink(make_shardings(plan.config))
        run_plan(plan, sink, seed=request.seed)
        return plan.config, sink.params, plan.report


@contextlib.contextmanager
def _planned(
    request: Request, *, tokens: int = 0, tokenizer: Path | None = None
) -> Iterator[tuple[Plan, Processor]]:
    """The checked plan; its sources are open inside the block."""
    with contextlib.ExitStack() as stack:
        opened = {option: stack.enter_context(open_source(path)) for option, path in request.sources.items()}
        config, processor, origin = _read_settings(request, opened)
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
        plan = make_plan(config, checkpoints, shapes_of(config), dtype=request.dtype)
        plan.report.notes.append(f"{processor.resampling} resampling of frames, from {origin}")
        if processor.time_instruction != "none":
            kind = processor.time_instruction
            plan.report.notes.append(
                f"{kind} time instruction about each video, from the source's config.json"
            )
        yield plan, processor


def _read_settings(request: Request, opened: dict[str, Source]) -> tuple[ModelConfig, Processor, str]:
    """Both settings of the MODEL folder, and where those of pictures come from."""
    if request.crosslmm is not None:
        return *read_crosslmm_config(export_folder(request.crosslmm)), "the export's config.json"
    config, settings = read_config(request, opened)
    processor = make_processor(
        config, sampling=SamplingConfig(), system_prompt=SYSTEM_PROMPT, resampling=settings.resampling,
        time_instruction="none" if request.llava is None else llava_time_instruction(_folder(request.llava)),
    )  # fmt: skip
    return config, processor, settings.source


def read_config(request: Request, opened: dict[str, Source]) -> tuple[ModelConfig, ImageSettings]:
    """The model's config, from the sources' config.json, the preset and the overrides in this order.

    Raises:
      UserError: a value is missing, cannot be converted, or differs from the preset's.
    """
    preset = get_preset(request.preset) if request.preset is not None else None
    sizes = _read_sizes(request, opened, preset)
    assert sizes.vision is not None and sizes.decoder is not None
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
        decoder = dataclasses.replace(preset.decoder, max_positions=decoder.max_positions)
        config = dataclasses.replace(preset, vision=vision, decoder=decoder)
    if request.overrides:
        config = apply_overrides(config, request.overrides, source="convert from-hf")
    return config, settings


def _read_sizes(request: Request, opened: dict[str, Source], preset: ModelConfig | None) -> Sizes:
    if request.llava is not None:
        has_head = any(canonical(name) == "lm_head.weight" for name in opened["--llava"].tensors)
        tower = None if request.vision is None else vision_sizes(_folder(request.vision))
        return llava_sizes(_folder(request.llava), has_head=has_head, tower=tower)
    decoder = decoder_sizes(_folder(request.llm))
    if Path(str(request.vision)).suffix != ".npz":
        return Sizes(vision_sizes(_folder(request.vision)), decoder)
    if preset is None:
        raise UserError(f"{request.vision}: a big_vision file does not say its sizes; add --preset")
    return Sizes(preset.vision, decoder)


def _folder(path: str | None) -> Path:
    return Path(str(path)) if Path(str(path)).is_dir() else Path(str(path)).parent


def _image_settings(request: Request, image_size: int) -> ImageSettings:
    """Settings of the image processor, which lie with the vision tower."""
    path = request.llava if request.vision is None else request.vision
    if Path(str(path)).suffix == ".npz":
        return ImageSettings(resampling="bilinear", source="big_vision's own pictures")
    return image_settings(_folder(path), image_size)


def _check_preset(name: str, preset: ModelConfig, sizes: Sizes) -> None:
    """Raises a `ConfigError` listing every size of the source that is not the preset's."""
    different = []
    for part, theirs, ours in (
        ("vision", sizes.vision, preset.vision), ("decoder", sizes.decoder, preset.decoder)
    ):  # fmt: skip
        for field in dataclasses.fields(ours):
            left, right = getattr(theirs, field.name), getattr(ours, field.name)
            if field.name not in _NOT_COMPARED and left != right:
                different.append(f"{part}.{field.name} is {left}, the preset's is {right}")
    different += _layers(sizes.vision, preset.vision) + _more(sizes.decoder, preset.decoder)
    if different:
        raise ConfigError(
            f"--preset {name} does not fit the source: {'; '.join(different)}; leave --preset out"
        )


def _layers(theirs: VisionConfig | None, ours: VisionConfig) -> list[str]:
    if theirs is None or theirs.depth == ours.depth:
        return []
    return [f"vision runs {theirs.depth} layers up to its features, the preset's {ours.depth}"]


def _more(theirs: DecoderConfig | None, ours: DecoderConfig) -> list[str]:
    """The decoder's layers, and rows of the vocabulary that are missing (more rows are cut)."""
    if theirs is None:
        return []
    problems = []
    if theirs.num_layers != ours.num_layers:
        problems.append(f"decoder.num_layers is {theirs.num_layers}, the preset's is {ours.num_layers}")
    if theirs.vocab_size < ours.vocab_size:
        problems.append(f"decoder.vocab_size is {theirs.vocab_size}, the preset's is {ours.vocab_size}")
    return problems
