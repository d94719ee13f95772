"""Every setting of the project as frozen dataclasses, checked when they are built.

A config file in `configs/` is Python that returns an `ExperimentConfig`. The command line overrides any field
of it, and a MODEL folder stores its `ModelConfig` as JSON (`crosslmm_jax.config_io`). Sizes have no defaults
here: `crosslmm_jax.presets` holds the released ones.

The annotation of each field says its role, which decides what may change between runs:

| role | decides | resume a run | start from a MODEL folder | `convert from-hf` |
|---|---|---|---|---|
| `Architecture` | sizes and constants of released weights | must agree | must agree | read from the source |
| `Identity` | what else weights and data mean | must agree | must agree | may be set |
| `Recipe` | how the model learns | may change on purpose | may change | may be set, but for positions |
| `Performance` | time and memory | may change | may change | may be set |
| `Host` | where the run reads and writes, and how often | may change | may change | - |

On purpose: with `run.accept_changes`. Paths are compared by what they lead to.

The comment beside a field is its help on the command line: `crosslmm train CONFIG --help`.
"""

import dataclasses
import os
import re
import typing
from dataclasses import field
from typing import Annotated, Literal, NamedTuple, TypeVar

from crosslmm_jax.errors import ConfigError

Value = TypeVar("Value")
Role = Literal["architecture", "identity", "recipe", "performance", "host"]
Architecture = Annotated[Value, "architecture"]
Identity = Annotated[Value, "identity"]
Recipe = Annotated[Value, "recipe"]
Performance = Annotated[Value, "performance"]
Host = Annotated[Value, "host"]

Direction = Literal["v2v", "t2v"]
Pooling = Literal["average", "bilinear", "bilinear_antialias"]
AttentionBackend = Literal["auto", "reference", "blockwise", "cudnn", "splash", "plain"]
# "compute": `ModelConfig.compute_dtype`. The others are 8 bits with float32 scales.
Precision = Literal["compute", "fp8", "int8"]
TimeInstruction = Literal["none", "short", "full"]
Part = Literal["encoder", "projector", "v2v", "t2v", "decoder"]
LARGEST_SEED = 2**32 - 1
PARTS: tuple[Part, ...] = ("encoder", "projector", "v2v", "t2v", "decoder")


def _require(config: object, name: str, ok: bool, expected: str) -> None:
    """Raises a `ConfigError` with the field, its value and the values it may have, unless `ok`."""
    if not ok:
        value = getattr(config, name)
        raise ConfigError(f"{type(config).__name__}.{name} is {value!r}; it must be {expected}")


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        _require(config, name, getattr(config, name) > 0, "greater than 0")
        _require(config, name, getattr(config, name) < float("inf"), "finite")


def _require_not_negative(config: object, *names: str) -> None:
    for name in names:
        _require(config, name, 0 <= getattr(config, name) < float("inf"), "0 or more, and finite")


def _require_seed(config: object, name: str) -> None:
    """Random generators take 32 bits; others would be dropped in silence."""
    _require(config, name, 0 <= getattr(config, name) <= LARGEST_SEED, f"within 0..{LARGEST_SEED}")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether `path` names an object of a store, or a page.

    That is gs://bucket/folder anywhere in it, and gs:/bucket/folder at its beginning, as `Path` writes it.
    """
    text = os.fspath(path)
    return "://" in text or re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text) is not None


def _require_mounted(config: object, *names: str) -> None:
    for name in names:
        mounted = not is_remote(getattr(config, name) or "")
        _require(config, name, mounted, "a folder of a mounted disk; object stores are not supported yet")


class Leaf(NamedTuple):
    """A field that holds a value, not further fields."""

    type: object  # its annotation, without the role
    role: Role | None  # None: the field declares no role, which a test forbids


def leaf_fields(config_class: type) -> dict[str, Leaf]:
    """Dotted name -> leaf of every field of a configuration class, e.g. `"stage.learning_rate"`."""
    leaves = {}
    for name, hint in typing.get_type_hints(config_class, include_extras=True).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            leaves |= {f"{name}.{inner}": leaf for inner, leaf in leaf_fields(hint).items()}
        elif typing.get_origin(hint) is Annotated:
            leaves[name] = Leaf(hint.__origin__, hint.__metadata__[0])
        else:
            leaves[name] = Leaf(hint, None)
    return leaves


def names_with_role(config_class: type, *roles: Role) -> tuple[str, ...]:
    """Dotted names of the fields with one of `roles`, in their order in the class."""
    return tuple(name for name, leaf in leaf_fields(config_class).items() if leaf.role in roles)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A SigLIP2 vision tower: fixed resolution, no class token.

    Layers above `feature_layer` hold no parameters here.
    """

    image_size: Architecture[int]  # pixels along each side of a frame
    patch_size: Architecture[int]  # pixels along each side of a patch
    width: Architecture[int]  # W, hidden width
    num_layers: Architecture[int]  # of the released tower, those above feature_layer included
    num_heads: Architecture[int]  # attention heads
    mlp_width: Architecture[int]  # hidden width of the MLP
    layer_norm_eps: Architecture[float] = 1e-6  # epsilon of every LayerNorm
    image_mean: Architecture[tuple[float, float, float]] = (0.5, 0.5, 0.5)  # of pixels scaled to 0..1
    image_std: Architecture[tuple[float, float, float]] = (0.5, 0.5, 0.5)  # of pixels scaled to 0..1
    # Layer whose output is read, counted as Hugging Face's `hidden_states`. LLaVA reads -2, the last but one.
    feature_layer: Identity[int] = -2
    post_layernorm: Identity[bool] = False  # apply the tower's last LayerNorm to the features
    # Frames per device that are encoded, pooled and projected at once; None: chosen by the device's memory.
    frame_chunk: Performance[int | None] = None
    # What the backward pass recomputes, from most memory to least; elementwise: norms and GELU only.
    remat: Performance[Literal["none", "elementwise", "layer", "chunk"]] = "layer"
    keep_features: Performance[bool] = False  # keep features for the backward pass; use with a frozen tower

    def __post_init__(self) -> None:
        _require_positive(self, "image_size", "patch_size", "width", "num_layers", "num_heads", "mlp_width")
        _require_positive(self, "layer_norm_eps")
        _require(self, "frame_chunk", self.frame_chunk is None or self.frame_chunk > 0, "1 or more, or None")
        _require(self, "patch_size", self.patch_size <= self.image_size, "at most image_size")
        _require(self, "num_heads", self.width % self.num_heads == 0, f"a divisor of width {self.width}")
        lowest = -self.num_layers
        finite = all(abs(value) < float("inf") for value in self.image_mean)
        _require(self, "image_mean", finite, "finite numbers")
        above = all(0 < value < float("inf") for value in self.image_std)
        _require(self, "image_std", above, "finite numbers greater than 0")
        _require(self, "feature_layer", lowest <= self.feature_layer <= -1, f"within {lowest}..-1")

    @property
    def grid(self) -> int:
        """Patches along one side of a frame; pixels that fill no whole patch are not read."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """P, patches per frame."""
        return self.grid**2

    @property
    def head_dim(self) -> int:
        """H of the encoder."""
        return self.width // self.num_heads

    @property
    def depth(self) -> int:
        """Number of layers that run, up to `feature_layer`."""
        return self.num_layers + 1 + self.feature_layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Token merge and projector (paper sec. 3.1): P patches of a frame become C compact tokens."""

    grid: Recipe[int]  # compact tokens along one side: 1, 3 or 4 for 1, 9 or 16 tokens per frame
    pooling: Recipe[Pooling] = "average"  # how patches are merged
    projector_input_norm: Identity[bool] = False  # LayerNorm on the projector's input; LLaVA has none

    def __post_init__(self) -> None:
        _require_positive(self, "grid")

    @property
    def tokens_per_frame(self) -> int:
        """C, compact tokens per frame."""
        return self.grid**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A Qwen2 / Qwen2.5 causal language model."""

    vocab_size: Identity[int]  # rows of the embedding, may exceed the tokenizer's vocabulary
    width: Architecture[int]  # D, hidden width
    num_layers: Architecture[int]  # decoder layers
    num_heads: Architecture[int]  # N, query heads
    num_kv_heads: Architecture[int]  # K, key and value heads
    head_dim: Architecture[int]  # H, width of a head
    mlp_width: Architecture[int]  # M, hidden width of the MLP
    rope_theta: Architecture[float]  # base of the rotary embedding
    rms_norm_eps: Architecture[float]  # epsilon of every RMSNorm
    tie_embeddings: Architecture[bool]  # the output head is the embedding
    max_positions: Recipe[int]  # longest sequence, visual tokens included
    # YaRN: rotary positions for so many times yarn_trained_positions; 1: as they were trained.
    yarn_factor: Recipe[float] = 1.0
    yarn_trained_positions: Recipe[int] = 32768  # positions of the training before YaRN
    remat: Performance[bool] = True  # recompute each group of layers in the backward pass

    def __post_init__(self) -> None:
        _require_positive(self, "vocab_size", "width", "num_layers", "num_heads", "num_kv_heads")
        _require_positive(self, "head_dim", "mlp_width", "rope_theta", "rms_norm_eps", "max_positions")
        divides = self.num_heads % self.num_kv_heads == 0
        _require(self, "num_kv_heads", divides, f"a divisor of num_heads {self.num_heads}")
        _require(self, "head_dim", self.head_dim % 2 == 0, "even, since the rotary embedding rotates pairs")
        _require(self, "yarn_factor", 1 <= self.yarn_factor < float("inf"), "1 or more")
        _require_positive(self, "yarn_trained_positions")
        most = self.yarn_factor * self.yarn_trained_positions
        reached = self.yarn_factor == 1 or self.max_positions <= most
        _require(self, "max_positions", reached, f"at most yarn_factor * yarn_trained_positions, {most:g}")

    def with_positions(self, needed: int) -> "DecoderConfig":
        """The same decoder with at least `needed` positions, by YaRN.

        It keeps its factor as far as that reaches; else the factor is the smallest whole one.
        """
        if needed <= self.max_positions:
            return self
        trained = self.max_positions if self.yarn_factor == 1 else self.yarn_trained_positions
        enough = needed <= self.yarn_factor * trained
        factor = self.yarn_factor if enough else float(-(-needed // trained))
        return dataclasses.replace(
            self, yarn_factor=factor, yarn_trained_positions=trained, max_positions=int(factor * trained)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossAttentionConfig:
    """Gated dual cross-attention (paper sec. 3.2 and 3.3, eq. 4-10)."""

    cross_attn_every: Identity[int] = 4  # every so many decoder layers carry it: the paper's K
    cross_attn_offset: Identity[int] = 0  # first decoder layer that carries it
    directions: Recipe[tuple[Direction, ...]] = ("v2v", "t2v")  # in the graph; both always hold parameters
    kv_source: Identity[Literal["projected", "encoder"]] = "projected"  # tokens that give keys and values
    cross_attn_init: Identity[Literal["copy", "fresh"]] = "copy"  # the layer's self-attention, or random
    gate_init: Identity[float] = 0.0  # initial gate, before tanh
    v2v_scope: Recipe[Literal["video", "frame", "window"]] = "video"  # frames that a visual token reads
    v2v_window: Recipe[int] = 8  # frames read on each side, for v2v_scope "window"
    cross_attn_rope: Recipe[Literal["none", "time"]] = "none"  # time: rotary embedding over the frame index
    cache_dtype: Performance[Precision] = "compute"  # of the video KV cache of T2V in generation

    def __post_init__(self) -> None:
        _require_positive(self, "cross_attn_every", "v2v_window")
        _require(self, "gate_init", abs(self.gate_init) < float("inf"), "a finite number")
        _require(self, "cross_attn_offset", self.cross_attn_offset >= 0, "0 or more")
        known = set(self.directions) <= {"v2v", "t2v"} and len(set(self.directions)) == len(self.directions)
        _require(self, "directions", known, 'made of "v2v" and "t2v", each at most once')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model: frames and tokens in, logits out."""

    vision: VisionConfig
    merge: MergeConfig
    decoder: DecoderConfig
    cross_attention: CrossAttentionConfig = field(default_factory=CrossAttentionConfig)
    compute_dtype: Recipe[Literal["bfloat16", "float32"]] = "bfloat16"  # of activations and matmuls
    visual_matmul: Recipe[Precision] = "compute"  # of encoder and projector; 8 bits only at inference
    attention: Performance[AttentionBackend] = "auto"  # backend; auto: by platform and shape

    def __post_init__(self) -> None:
        if self.merge.grid > self.vision.grid:
            raise ConfigError(
                f"MergeConfig.grid is {self.merge.grid}; it must be at most the encoder's"
                f" {self.vision.grid} patches per side"
            )
        offset, layers = self.cross_attention.cross_attn_offset, self.decoder.num_layers
        if offset >= layers:
            raise ConfigError(
                f"CrossAttentionConfig.cross_attn_offset is {offset}; it must be below the decoder's"
                f" {layers} layers"
            )
        if self.attention == "cudnn":
            sizes, cross = (self.vision.head_dim, self.decoder.head_dim), self.cross_attention
            windowed = cross.v2v_scope == "window" and "v2v" in cross.directions
            applies = self.compute_dtype == "bfloat16" and not windowed and all(x % 8 == 0 for x in sizes)
            needs = "cudnn takes bfloat16, head sizes divisible by 8, no v2v_scope 'window'"
            _require(self, "attention", applies, f"'auto' or 'blockwise' with these settings: {needs}")

    def at_precision(self, precision: Precision) -> "ModelConfig":
        """The same model with encoder, projector and video KV cache in `precision`, for inference."""
        cross = dataclasses.replace(self.cross_attention, cache_dtype=precision)
        return dataclasses.replace(self, visual_matmul=precision, cross_attention=cross)

    @property
    def cross_attention_layers(self) -> tuple[int, ...]:
        """Indices of the decoder layers that carry cross-attention."""
        cross = self.cross_attention
        return tuple(range(cross.cross_attn_offset, self.decoder.num_layers, cross.cross_attn_every))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Which frames of a video are read; see `crosslmm_jax.data.media.frame_sampling`."""

    policy: Recipe[Literal["uniform", "fps", "llava", "dynamic_fps1"]] = "uniform"  # rule that picks frames
    frames: Recipe[int] = 32  # uniform: exactly so many; fps and llava: at most so many
    fps: Recipe[float] = 1.0  # frames per second, for fps and llava
    force_sample: Recipe[bool] = False  # llava: always exactly `frames`
    min_frames: Recipe[int] = 64  # dynamic_fps1: fewest frames
    max_frames: Recipe[int] = 512  # dynamic_fps1: most frames
    multiple: Recipe[int] = 4  # dynamic_fps1: frame counts are multiples of this

    def __post_init__(self) -> None:
        _require_positive(self, "frames", "fps", "min_frames", "max_frames", "multiple")
        for name in ("min_frames", "max_frames"):
            _require(self, name, getattr(self, name) % self.multiple == 0, f"a multiple of {self.multiple}")
        _require(self, "max_frames", self.max_frames >= self.min_frames, "at least min_frames")

    @property
    def most_frames(self) -> int:
        """Largest number of frames that a video can give."""
        return self.max_frames if self.policy == "dynamic_fps1" else self.frames


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModalityWeights:
    """Shares of the steps by modality. All 0: shares follow the number of rows. Else 0 drops a modality."""

    text: Recipe[float] = 0.0  # rows without media
    image: Recipe[float] = 0.0  # rows with one image
    multi_image: Recipe[float] = 0.0  # rows with several images
    video: Recipe[float] = 0.0  # rows with video

    def __post_init__(self) -> None:
        for name, weight in dataclasses.asdict(self).items():
            _require(self, name, 0 <= weight < float("inf"), "0 or more")

    def as_dict(self) -> dict[str, float] | None:
        """The weights above 0, or None when all are 0."""
        return {name: weight for name, weight in dataclasses.asdict(self).items() if weight} or None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Held-out rows, whose loss and accuracy are computed while a run trains. By default there are none."""

    index: Host[str | None] = None  # folder of an index of rows to validate on
    share: Recipe[float] = 0.0  # or this share of the rows of data.index, which is then not trained on
    every: Host[int] = 500  # steps between validations; the last step has one too
    rows: Host[int] = 1000  # most rows that are read each time
    keep_best: Host[bool] = True  # keep the checkpoint with the smallest loss besides the newest ones

    def __post_init__(self) -> None:
        _require_positive(self, "every", "rows")
        _require(self, "share", 0 <= self.share < 1, "in [0, 1)")
        _require(
            self, "share", not self.share or self.index is None, "0 with an index, which has its own rows"
        )
        _require_mounted(self, "index")

    @property
    def enabled(self) -> bool:
        """Whether there are held-out rows."""
        return self.index is not None or self.share > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Indexed rows, and how they become batches of a few static shapes."""

    index: Host[str]  # folder that `crosslmm data index` wrote
    tokenizer: Identity[str]  # folder that `AutoTokenizer` reads; the index must be made with it
    batch_size: Recipe[int]  # global batch: rows per step over all devices
    allow_outside: Recipe[bool] = False  # media may lie outside their root; same as for the index
    # Text tokens (all that are not visual) of the batch shapes, ascending; empty: chosen from the index.
    text_buckets: Recipe[tuple[int, ...]] = ()
    frame_buckets: Recipe[tuple[int, ...]] = ()  # frames of the shapes, ascending; empty: from the index
    max_shapes: Recipe[int] = 16  # most (frames, text) shapes that are chosen from the index
    max_text_tokens: Recipe[int] = 2048  # longer rows lose their last turns; text_buckets take precedence
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    # Filter that resizes frames: bicubic is LLaVA's; SigLIP2's processor is bilinear.
    resampling: Identity[Literal["bicubic", "bilinear"]] = "bicubic"
    # plain: media, then the caption, without a chat template (LLaVA's stage 1)
    style: Recipe[Literal["chat", "plain"]] = "chat"
    label_mode: Recipe[Literal["clean", "llava"]] = "clean"  # llava: loss also on the template, as LLaVA
    system_prompt: Recipe[str] = "You are a helpful assistant."  # first message of every chat
    time_instruction: Identity[TimeInstruction] = "none"  # what a chat says of each video's length and times
    modality_weights: ModalityWeights = field(default_factory=ModalityWeights)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    max_bad_fraction: Recipe[float] = 0.05  # a larger share of damaged rows stops the run
    # A video is refused if a larger share of its frames is damaged; damaged frames are read as decoders show
    # them.
    max_damaged: Recipe[float] = 0.1
    # Seconds without new data after which a file fails; None: no limit. The total time has no limit, since it
    # depends on the load of the machine, and batches must not.
    deadline_s: Host[float | None] = 1800.0
    num_workers: Host[int] = 0  # processes that decode; 0: in the training process
    num_threads: Host[int] = 2  # threads per process that read the rows of batches made ahead
    prefetch: Host[int] = 8  # batches made ahead
    frame_cache_mb: Host[int] = 0  # megabytes of decoded frames kept per process
    shuffle: Recipe[bool] = True  # another order of the rows in each epoch
    seed: Recipe[int] = 0  # of the order of the rows

    def __post_init__(self) -> None:
        _require_positive(self, "batch_size", "num_threads", "prefetch", "max_shapes", "max_text_tokens")
        for name in ("text_buckets", "frame_buckets"):
            sizes = getattr(self, name)
            ascending = list(sizes) == sorted(set(sizes)) and all(size > 0 for size in sizes)
            _require(self, name, ascending, "positive and ascending")
        _require(self, "index", bool(self.index), "the name of a folder")
        _require_mounted(self, "index", "tokenizer")
        timed = self.time_instruction == "none" or self.style == "chat"
        _require(self, "time_instruction", timed, '"none" with style "plain", which has no place for it')
        limited = self.deadline_s is None or 0 < self.deadline_s < float("inf")
        _require(self, "deadline_s", limited, "a finite number greater than 0, or None")
        _require_seed(self, "seed")
        for name in ("max_bad_fraction", "max_damaged"):
            _require(self, name, 0 <= getattr(self, name) <= 1, "within 0..1")
        _require(self, "num_workers", self.num_workers >= 0, "0 or more")
        _require(self, "frame_cache_mb", self.frame_cache_mb >= 0, "0 or more")

    @property
    def most_text_tokens(self) -> int:
        """Most text tokens of a row."""
        return self.text_buckets[-1] if self.text_buckets else self.max_text_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters of low rank that learn beside frozen matrices (LoRA, arXiv:2106.09685). By default none."""

    rank: Recipe[int] = 0  # inner width of an adapter; 0: no LoRA
    alpha: Recipe[float] = 16.0  # the product of an adapter is multiplied by alpha / rank
    # Matrices that get one: parts, or patterns of names, of decoder.layers, v2v and t2v.
    targets: Recipe[tuple[str, ...]] = ("decoder.layers", "v2v", "t2v")
    lr_scale: Recipe[float] = 1.0  # adapters' rate over learning_rate

    def __post_init__(self) -> None:
        _require(self, "rank", self.rank >= 0, "0 or more")
        _require_positive(self, "alpha")
        _require_not_negative(self, "lr_scale")
        _require(self, "targets", bool(self.targets) and all(map(_may_match, self.targets)), _PATTERNS)


_PATTERNS = f"some of {', '.join(PARTS)}, or patterns of parameter names such as decoder.layers.w*"


def _may_match(pattern: str) -> bool:
    """Whether a pattern of parameter names begins with a part, or with a wildcard."""
    first = pattern.split(".")[0]
    return first in PARTS or any(wildcard in first for wildcard in "*?[")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of training: what learns, how fast, for how long (paper sec. 4.1, table 3)."""

    name: Recipe[str]  # shown in logs and reports
    # What learns: parts, or patterns of parameter names (`crosslmm_jax.train.stages`). The rest stays
    # bit-identical.
    trainable: Recipe[tuple[str, ...]]
    directions: Recipe[tuple[Direction, ...]]  # cross-attention in the graph
    steps: Recipe[int]  # optimiser steps
    learning_rate: Recipe[float]  # peak rate of every part without a scale below
    frozen: Recipe[tuple[str, ...]] = ()  # parts or patterns that do not learn although trainable names them
    # Of matrices and biases that do not learn. bfloat16 takes half the memory, and in a model that computes
    # in bfloat16 changes no step.
    frozen_dtype: Recipe[Literal["float32", "bfloat16"]] = "float32"
    lora: LoraConfig = field(default_factory=LoraConfig)
    vision_lr_scale: Recipe[float] = 1.0  # encoder's rate over learning_rate
    cross_attn_lr_scale: Recipe[float] = 1.0  # cross-attention's rate over learning_rate
    gate_lr_scale: Recipe[float] = 1.0  # gates' rate over that of cross-attention
    warmup_ratio: Recipe[float] = 0.03  # share of the steps in which the rate rises linearly
    weight_decay: Recipe[float] = 0.0  # never on norms, biases and gates
    b1: Recipe[float] = 0.9  # Adam's decay of the first moment
    b2: Recipe[float] = 0.999  # Adam's decay of the second moment
    eps: Recipe[float] = 1e-8  # Adam's epsilon
    clip_norm: Recipe[float] = 1.0  # largest global gradient norm
    # Gradient accumulation: microbatches per global batch; None: as few as fit the memory of the devices.
    microbatches: Performance[int | None] = 1

    def __post_init__(self) -> None:
        _require_positive(self, "steps", "learning_rate", "eps", "clip_norm")
        counted = self.microbatches is None or self.microbatches > 0
        _require(self, "microbatches", counted, "1 or more, or None")
        _require_not_negative(self, "weight_decay", "vision_lr_scale", "cross_attn_lr_scale", "gate_lr_scale")
        for name in ("b1", "b2"):
            _require(self, name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        _require(self, "trainable", bool(self.trainable) or self.lora.rank > 0, _PATTERNS)
        for name in ("trainable", "frozen"):
            _require(self, name, all(map(_may_match, getattr(self, name))), _PATTERNS)
        _require(self, "directions", set(self.directions) <= {"v2v", "t2v"}, 'made of "v2v" and "t2v"')
        for part in ("v2v", "t2v"):
            named = any(name.split(".")[0] == part for name in self.trainable) and part not in self.frozen
            fits = not named or part in self.directions
            _require(self, "directions", fits, f"with {part!r}, since trainable names it")
        _require(self, "warmup_ratio", 0 <= self.warmup_ratio < 1, "in [0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; -1: all remaining devices.

    Several axes of -1 are chosen together, from the devices and the rows of a batch: see
    `crosslmm_jax.parallel.mesh_sizes`.
    """

    data: Performance[int] = -1  # rows of a batch over devices; weights replicated
    fsdp: Performance[int] = 1  # rows of a batch over devices; weights sharded
    tensor: Performance[int] = 1  # heads and MLP over devices
    context: Performance[int] = 1  # frames of one video over devices

    def __post_init__(self) -> None:
        for name in ("data", "fsdp", "tensor", "context"):
            _require(self, name, getattr(self, name) > 0 or getattr(self, name) == -1, "1 or more, or -1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """Seconds after which a run ends that would wait in vain; 0: no bound.

    All of its processes then end with exit code 75. The stacks of their threads are in RUN/stacks/, and one
    line says which processes the others wait for.
    """

    start_s: Host[float] = 600.0  # until all processes have started
    silence_s: Host[float] = 60.0  # of a process that is stopped, or whose host is lost
    restore_s: Host[float] = 3600.0  # reading a checkpoint, or the weights to start from
    input_wait_s: Host[float] = 1800.0  # waiting for a batch
    compile_s: Host[float] = 3600.0  # of the program for one shape of batches
    step_s: Host[float] = 1800.0  # a step, with waiting for the devices and the other processes
    validation_s: Host[float] = 1800.0  # one batch of validation
    checkpoint_s: Host[float] = 3600.0  # as long as training waits for one; the MODEL folder
    end_s: Host[float] = 3600.0  # until all processes are at their end

    def __post_init__(self) -> None:
        _require_not_negative(self, *(each.name for each in dataclasses.fields(self)))


_STEPS = "FIRST:LAST, two numbers of steps such as 10:13, or None"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Weights to start from, and where and how often results are written."""

    out: Host[str]  # run folder: checkpoints/, metrics.jsonl, tensorboard/, model/
    init_from: Recipe[str | None] = None  # MODEL or run folder to start from; None: random weights
    seed: Recipe[int] = 0  # of random weights and of adapters
    log_every: Host[int] = 10  # steps between lines of metrics
    save_every: Host[int] = 500  # steps between checkpoints
    keep_checkpoints: Host[int] = 2  # newest checkpoints that are kept
    tensorboard: Host[bool] = True  # also write metrics for TensorBoard
    wandb: Host[str | None] = None  # also write metrics to this project of Weights & Biases
    # FIRST:LAST, both included: a profiler's trace of these steps is written, for XProf and Perfetto.
    profile_steps: Host[str | None] = None
    accept_changes: Host[bool] = False  # resume although fields of role "recipe" have changed
    stop_deadline_s: Host[float] = 300.0  # from SIGTERM or Ctrl-C to the end; then it ends unsaved
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)

    def __post_init__(self) -> None:
        _require_positive(self, "log_every", "save_every", "keep_checkpoints", "stop_deadline_s")
        _require(self, "out", bool(self.out), "the name of a folder")
        _require(self, "wandb", self.wandb != "", "the name of a project, or None")
        _require(self, "profile_steps", self.profile_steps is None or self.profiled is not None, _STEPS)
        _require_mounted(self, "out", "init_from")
        _require_seed(self, "seed")

    @property
    def profiled(self) -> tuple[int, int] | None:
        """First and last step of `profile_steps`; None if it has no such form."""
        found = re.fullmatch(r"(\d+):(\d+)", self.profile_steps or "")
        steps = (int(found[1]), int(found[2])) if found else (0, 0)
        return steps if 1 <= steps[0] <= steps[1] else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """One stage of training on one data set: what `crosslmm train configs/X.py` runs."""

    model: ModelConfig
    data: DataConfig
    stage: StageConfig
    run: RunConfig
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        if self.model.visual_matmul != "compute":
            raise ConfigError(
                f"ModelConfig.visual_matmul is {self.model.visual_matmul!r}; it must be 'compute' to train,"
                " since rounding to 8 bits has no gradient"
            )
        if self.data.batch_size % (self.stage.microbatches or 1):
            raise ConfigError(
                f"StageConfig.microbatches is {self.stage.microbatches}; it must divide"
                f" DataConfig.batch_size {self.data.batch_size}"
            )
