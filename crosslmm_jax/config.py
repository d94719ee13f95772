"""Every setting of the project as frozen dataclasses, checked when they are built.

A config file in `configs/` is Python that returns an `ExperimentConfig`; the command line overrides any
field of it; a MODEL folder stores its `ModelConfig` as JSON (`crosslmm_jax.config_io`). Sizes have no
defaults here: the released ones are written out in `crosslmm_jax.presets`.
"""

import dataclasses
from dataclasses import field
from typing import Literal

from crosslmm_jax.errors import ConfigError

Direction = Literal["v2v", "t2v"]
Pooling = Literal["average", "bilinear", "bilinear_antialias"]
AttentionBackend = Literal["auto", "reference", "blockwise", "cudnn", "splash", "plain"]
# "compute": in `ModelConfig.compute_dtype`. The others are 8 bits with float32 scales.
Precision = Literal["compute", "fp8", "int8"]
TimeInstruction = Literal["none", "short", "full"]
Part = Literal["encoder", "projector", "v2v", "t2v", "decoder"]
PARTS: tuple[Part, ...] = ("encoder", "projector", "v2v", "t2v", "decoder")


def _require(config: object, name: str, ok: bool, expected: str) -> None:
    """Raises a `ConfigError` that names the field, its value and what would be right."""
    if not ok:
        value = getattr(config, name)
        raise ConfigError(f"{type(config).__name__}.{name} is {value!r}; it must be {expected}")


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        _require(config, name, getattr(config, name) > 0, "greater than 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A SigLIP2 vision tower (fixed resolution, no class token).

    `num_layers` counts the layers of the released tower. `feature_layer` counts as Hugging Face's
    `hidden_states` does: -2 is the output of the last layer but one, which is what LLaVA reads. Layers
    above it hold no parameters here.
    """

    image_size: int  # pixels, square
    patch_size: int  # pixels, square
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    layer_norm_eps: float = 1e-6
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of pixels scaled to 0..1
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    feature_layer: int = -2
    post_layernorm: bool = False  # apply the tower's last LayerNorm to the features
    frame_chunk: int | None = None  # frames a device encodes, pools and projects at once; None: by its memory
    # What the backward pass recomputes, from most memory to least; elementwise: norms and GELU alone.
    remat: Literal["none", "elementwise", "layer", "chunk"] = "layer"
    keep_features: bool = False  # keep features for the backward pass: right when the tower is frozen

    def __post_init__(self) -> None:
        _require_positive(self, "image_size", "patch_size", "width", "num_layers", "num_heads", "mlp_width")
        _require_positive(self, "layer_norm_eps")
        _require(self, "frame_chunk", self.frame_chunk is None or self.frame_chunk > 0, "1 or more, or None")
        _require(self, "patch_size", self.patch_size <= self.image_size, "at most image_size")
        _require(self, "num_heads", self.width % self.num_heads == 0, f"a divisor of width {self.width}")
        lowest = -self.num_layers
        _require(self, "feature_layer", lowest <= self.feature_layer <= -1, f"within {lowest}..-1")

    @property
    def grid(self) -> int:
        """Patches along one side of a frame; pixels that fill no whole patch are not read."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """P, patches a frame."""
        return self.grid**2

    @property
    def head_dim(self) -> int:
        """H of the encoder."""
        return self.width // self.num_heads

    @property
    def depth(self) -> int:
        """Layers that are run to reach `feature_layer`."""
        return self.num_layers + 1 + self.feature_layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Token merge (paper sec. 3.1): how P patches of a frame become C compact tokens, and the projector."""

    grid: int  # compact tokens along one side: 1, 3 or 4 for 1, 9 or 16 tokens a frame
    pooling: Pooling = "average"
    projector_input_norm: bool = False  # LayerNorm on the projector's input (LLaVA has none)

    def __post_init__(self) -> None:
        _require_positive(self, "grid")

    @property
    def tokens_per_frame(self) -> int:
        """C, compact tokens a frame."""
        return self.grid**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A Qwen2 / Qwen2.5 causal language model."""

    vocab_size: int  # rows of the embedding, which may exceed the tokenizer's
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    rope_theta: float
    rms_norm_eps: float
    tie_embeddings: bool
    max_positions: int
    remat: bool = True  # recompute each group of layers in the backward pass

    def __post_init__(self) -> None:
        _require_positive(self, "vocab_size", "width", "num_layers", "num_heads", "num_kv_heads")
        _require_positive(self, "head_dim", "mlp_width", "rope_theta", "rms_norm_eps", "max_positions")
        divides = self.num_heads % self.num_kv_heads == 0
        _require(self, "num_kv_heads", divides, f"a divisor of num_heads {self.num_heads}")
        _require(self, "head_dim", self.head_dim % 2 == 0, "even (rotary embedding turns pairs)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossAttentionConfig:
    """Gated dual cross-attention (paper sec. 3.2 and 3.3, eq. 4-10)."""

    cross_attn_every: int = 4  # the paper's K
    cross_attn_offset: int = 0  # first decoder layer that carries cross-attention
    directions: tuple[Direction, ...] = ("v2v", "t2v")  # those in the graph; both always hold parameters
    kv_source: Literal["projected", "encoder"] = "projected"
    cross_attn_init: Literal["copy", "fresh"] = "copy"  # from the layer's self-attention, or random
    gate_init: float = 0.0  # before tanh
    v2v_scope: Literal["video", "frame", "window"] = "video"
    v2v_window: int = 8  # frames read on each side, only for v2v_scope="window"
    cross_attn_rope: Literal["none", "time"] = "none"  # rotary embedding over the frame index
    cache_dtype: Precision = "compute"  # of T2V's keys and values while text is generated

    def __post_init__(self) -> None:
        _require_positive(self, "cross_attn_every", "v2v_window")
        _require(self, "cross_attn_offset", self.cross_attn_offset >= 0, "0 or more")
        known = set(self.directions) <= {"v2v", "t2v"} and len(set(self.directions)) == len(self.directions)
        _require(self, "directions", known, 'made of "v2v" and "t2v", each at most once')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The whole model: frames and tokens in, logits out."""

    vision: VisionConfig
    merge: MergeConfig
    decoder: DecoderConfig
    cross_attention: CrossAttentionConfig = field(default_factory=CrossAttentionConfig)
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    visual_matmul: Precision = "compute"  # encoder's and projector's products; 8 bits only at inference
    attention: AttentionBackend = "auto"

    def __post_init__(self) -> None:
        if self.merge.grid > self.vision.grid:
            raise ConfigError(
                f"MergeConfig.grid is {self.merge.grid}; it must be at most the encoder's"
                f" {self.vision.grid} patches a side"
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
            other = "cudnn takes bfloat16, head sizes divisible by 8, no v2v_scope 'window'"
            _require(self, "attention", applies, f"'auto' or 'blockwise' with these settings: {other}")

    def at_precision(self, precision: Precision) -> "ModelConfig":
        """The same model with encoder, projector and T2V's cache in `precision`: for inference."""
        cross = dataclasses.replace(self.cross_attention, cache_dtype=precision)
        return dataclasses.replace(self, visual_matmul=precision, cross_attention=cross)

    @property
    def cross_attention_layers(self) -> tuple[int, ...]:
        """Indices of the decoder layers that carry cross-attention."""
        cross = self.cross_attention
        return tuple(range(cross.cross_attn_offset, self.decoder.num_layers, cross.cross_attn_every))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Which frames of a video are read; `crosslmm_jax.data.media.frame_sampling` says how."""

    policy: Literal["uniform", "fps", "llava", "dynamic_fps1"] = "uniform"
    frames: int = 32  # uniform: exactly this many; fps and llava: at most this many
    fps: float = 1.0  # frames a second, for fps and llava
    force_sample: bool = False  # llava: always exactly `frames`
    min_frames: int = 64  # dynamic_fps1
    max_frames: int = 512  # dynamic_fps1
    multiple: int = 4  # dynamic_fps1: counts are multiples of this

    def __post_init__(self) -> None:
        _require_positive(self, "frames", "fps", "min_frames", "max_frames", "multiple")
        for name in ("min_frames", "max_frames"):
            _require(self, name, getattr(self, name) % self.multiple == 0, f"a multiple of {self.multiple}")
        _require(self, "max_frames", self.max_frames >= self.min_frames, "at least min_frames")

    @property
    def most_frames(self) -> int:
        """The most frames that a video can give."""
        return self.max_frames if self.policy == "dynamic_fps1" else self.frames


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModalityWeights:
    """Shares of the steps by modality. All 0: each has as many as its rows make; else 0 leaves it out."""

    text: float = 0.0
    image: float = 0.0
    multi_image: float = 0.0
    video: float = 0.0

    def __post_init__(self) -> None:
        for name, weight in dataclasses.asdict(self).items():
            _require(self, name, 0 <= weight < float("inf"), "0 or more")

    def as_dict(self) -> dict[str, float] | None:
        """The weights above 0, or None when all are 0."""
        return {name: weight for name, weight in dataclasses.asdict(self).items() if weight} or None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Indexed rows, and how they become batches of a few static shapes."""

    index: str  # folder that `crosslmm data index` wrote
    tokenizer: str  # a folder that `AutoTokenizer` reads, the one that the index was made with
    batch_size: int  # global
    allow_outside: bool = False  # media may lie outside their root, as when the index was made
    text_buckets: tuple[int, ...] = ()  # tokens of a row that are not visual, ascending; (): from the index
    frame_buckets: tuple[int, ...] = ()  # frames of a row, ascending; (): from the index
    max_shapes: int = 16  # (frames, text) that are chosen from the index, at most
    max_text_tokens: int = 2048  # longer rows lose turns at their end; text_buckets overrule it
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    resampling: Literal["bicubic", "bilinear"] = "bicubic"  # LLaVA's; SigLIP2's own processor is bilinear
    style: Literal["chat", "plain"] = "chat"  # plain: media, then the caption, no template (LLaVA stage 1)
    label_mode: Literal["clean", "llava"] = "clean"  # llava: also the template's tokens, as LLaVA trains
    system_prompt: str = "You are a helpful assistant."
    time_instruction: TimeInstruction = "none"  # what a chat says about the length and times of each video
    modality_weights: ModalityWeights = field(default_factory=ModalityWeights)
    max_bad_fraction: float = 0.05  # of the rows read; more that are damaged stop the run
    # A file fails that gives nothing new for so long; None: no limit. The time in all is not limited: it
    # depends on what else the machine does, and batches must not.
    deadline_s: float | None = 1800.0
    num_workers: int = 0  # processes
    num_threads: int = 2  # threads that read ahead, per process
    prefetch: int = 8  # batches
    frame_cache_mb: int = 0  # megabytes of decoded frames kept in each process
    shuffle: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        _require_positive(self, "batch_size", "num_threads", "prefetch", "max_shapes", "max_text_tokens")
        for name in ("text_buckets", "frame_buckets"):
            sizes = getattr(self, name)
            ascending = list(sizes) == sorted(set(sizes)) and all(size > 0 for size in sizes)
            _require(self, name, ascending, "positive and ascending")
        _require(self, "index", bool(self.index), "the name of a folder")
        timed = self.time_instruction == "none" or self.style == "chat"
        _require(self, "time_instruction", timed, '"none" with style "plain", which has no place for it')
        limited = self.deadline_s is None or self.deadline_s > 0
        _require(self, "deadline_s", limited, "greater than 0, or None")
        _require(self, "max_bad_fraction", 0 <= self.max_bad_fraction <= 1, "within 0..1")
        _require(self, "num_workers", self.num_workers >= 0, "0 or more")
        _require(self, "frame_cache_mb", self.frame_cache_mb >= 0, "0 or more")

    @property
    def most_text_tokens(self) -> int:
        """Tokens of a row that are not visual, at most."""
        return self.text_buckets[-1] if self.text_buckets else self.max_text_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of training: what learns, how fast, for how long (paper sec. 4.1, table 3)."""

    name: str
    trainable: tuple[Part, ...]
    directions: tuple[Direction, ...]  # cross-attention in the graph
    steps: int
    learning_rate: float  # peak, of every part that has no scale of its own
    vision_lr_scale: float = 1.0
    cross_attn_lr_scale: float = 1.0
    gate_lr_scale: float = 1.0  # times cross_attn_lr_scale
    warmup_ratio: float = 0.03  # of steps
    weight_decay: float = 0.0  # never on norms, biases and gates
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 1.0  # global gradient norm
    microbatches: int = 1  # gradient accumulation: the batch is split in this many

    def __post_init__(self) -> None:
        _require_positive(self, "steps", "learning_rate", "clip_norm", "microbatches")
        known = bool(self.trainable) and set(self.trainable) <= set(PARTS)
        _require(self, "trainable", known, f"some of {', '.join(PARTS)}")
        _require(self, "directions", set(self.directions) <= {"v2v", "t2v"}, 'made of "v2v" and "t2v"')
        for part in {"v2v", "t2v"} & set(self.trainable):
            _require(self, "directions", part in self.directions, f"with {part!r}, since trainable names it")
        _require(self, "warmup_ratio", 0 <= self.warmup_ratio < 1, "in [0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1, which takes all that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1  # frames of one video over devices

    def __post_init__(self) -> None:
        sizes = dataclasses.astuple(self)
        for name in ("data", "fsdp", "tensor", "context"):
            _require(self, name, getattr(self, name) > 0 or getattr(self, name) == -1, "1 or more, or -1")
        _require(self, "data", sizes.count(-1) <= 1, "1 or more when another axis is -1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run reads its start from and writes its results, and how often."""

    out: str  # folder: checkpoints/, metrics.jsonl, tensorboard/, model/
    init_from: str | None = None  # MODEL folder to start from; None: random weights
    seed: int = 0
    log_every: int = 10  # steps
    save_every: int = 500  # steps
    keep_checkpoints: int = 2
    tensorboard: bool = True

    def __post_init__(self) -> None:
        _require_positive(self, "log_every", "save_every", "keep_checkpoints")
        _require(self, "out", bool(self.out), "the name of a folder")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """One stage of training on one set of data: what `crosslmm train configs/X.py` runs."""

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
        if self.data.batch_size % self.stage.microbatches:
            raise ConfigError(
                f"StageConfig.microbatches is {self.stage.microbatches}; it must divide"
                f" DataConfig.batch_size {self.data.batch_size}"
            )
