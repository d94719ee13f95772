"""`crosslmm convert verify`: a converted model against its source, block by block, in float32.

The source runs in PyTorch (`verify_source`), the MODEL folder in JAX, on the same random frames and tokens.
No block gets an output of the other side. Weights are read one layer at a time.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from crosslmm_jax.config import ModelConfig
from crosslmm_jax.convert import verify_source
from crosslmm_jax.convert.source.unreadable import check_readable
from crosslmm_jax.convert.verify_tensors import Tensors
from crosslmm_jax.errors import UserError
from crosslmm_jax.model import (
    Pooler,
    SiglipEncoder,
    encoder_layer,
    logits_of,
    mlp,
    patchify,
    rms_norm,
    self_attention,
)
from crosslmm_jax.model_folder import load_model_config, open_weights, parameter_shapes

FRAMES, TOKENS = 2, 32
Layer = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference between the outputs of one block here and in the source.

    Rounding errors grow with the values, which reach thousands in trained decoders. So the limit is
    `tolerance` times the root mean square of the source's output, where that is above 1.
    """

    block: str
    max_abs: float
    mean_abs: float
    rms: float  # root mean square of the source's output

    def within(self, tolerance: float) -> bool:
        """Whether the block agrees. Values that are not finite never agree."""
        return self.max_abs <= tolerance * max(1.0, self.rms)


@dataclasses.dataclass(frozen=True)
class Verification:
    """All blocks in the order in which they run."""

    differences: tuple[Difference, ...]
    tolerance: float
    notes: tuple[str, ...] = ()

    @property
    def diverging(self) -> Difference | None:
        """The first block that does not agree."""
        return next((d for d in self.differences if not d.within(self.tolerance)), None)

    def lines(self) -> list[str]:
        """For people."""
        table = [f"{'block':<20}{'max abs diff':>14}{'mean abs diff':>15}{'rms of source':>15}"]
        table += [
            f"{d.block:<20}{d.max_abs:>14.2e}{d.mean_abs:>15.2e}{d.rms:>15.2e}"
            for d in self.differences
        ]  # fmt: skip
        first = self.diverging
        last = f"all {len(self.differences)} blocks agree within {self.tolerance:g}"
        if first is not None:
            last = f"first block that diverges: {first.block} ({first.max_abs:.2e} > {self.tolerance:g}"
            last += f" x its rms {first.rms:.3g})" if first.rms > 1 else ")"
        return [*table, *self.notes, last]

    def as_dict(self) -> dict[str, object]:
        """All of it, for JSON."""
        first = self.diverging
        return {
            "blocks": [dataclasses.asdict(d) for d in self.differences],
            "tolerance": self.tolerance,
            "notes": list(self.notes),
            "first_diverging": None if first is None else first.block,
        }


def verify(
    model: str | Path,
    *,
    vision: str | None = None,
    llm: str | None = None,
    llava: str | None = None,
    projector: str | None = None,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> Verification:
    """Compares the MODEL folder `model` with what it was converted from.

    Args:
      model: a MODEL folder.
      vision: SigLIP folder. With `llava`: settings of its image processor, and its weights if that has no
        tower.
      llm: Qwen2 folder.
      llava: LLaVA folder in any layout, instead of the other two.
      projector: `mm_projector.bin`, if the conversion used one.
      tolerance: see `Difference`.
      seed: of frames and tokens.

    Raises:
      UserError: torch is missing, or the sources are not those of a model of this shape.
    """
    folders = {"--llava": llava} if llava is not None else {"--vision": vision, "--llm": llm}
    if None in folders.values() or (llava is not None and llm is not None):
        raise UserError("give either --vision and --llm, or --llava: what the model was converted from")
    verify_source.require_torch()
    paths = {option: Path(str(path)) for option, path in folders.items()}
    further = {"--vision": vision, "--projector": projector}
    for option, path in (further | paths).items():
        if path is not None and Path(path).suffix == ".npz":
            raise UserError(
                f"{option} {path}: torch reads no .npz; give the same tower's Hugging Face folder"
            )
        if path is not None:
            check_readable(option, path)
    config = dataclasses.replace(load_model_config(model), compute_dtype="float32", visual_matmul="compute")
    rng, size = np.random.default_rng(seed), config.vision.image_size
    frames = rng.integers(0, 256, (FRAMES, size, size, 3), dtype=np.uint8)
    tensors = _tensors(paths, vision=vision, projector=projector)
    rows = min(config.decoder.vocab_size, tensors.rows("model.embed_tokens.weight"))
    tokens = rng.integers(0, rows, (1, TOKENS)).astype(np.int32)
    pixels = verify_source.normalised(frames, Path(str(vision if vision is not None else llava)))
    theirs = verify_source.source_blocks(tensors, config, paths, pixels=pixels, tokens=tokens)
    with open_model(Path(model), config) as read, jax.default_matmul_precision("highest"):
        ours = model_blocks(read, config, frames, tokens, with_projector="projector" in theirs)
        differences = tuple(compare(name, value, theirs.get(name)) for name, value in ours)
    notes = () if "projector" in theirs else ("projector: the source has none, nothing to compare",)
    return Verification(differences, tolerance, notes)


def _tensors(folders: Mapping[str, Path], *, vision: str | None, projector: str | None) -> Tensors:
    """The source's tensors. Those of `vision` are read unless a LLaVA checkpoint has a tower."""
    paths = [*folders.values(), *([] if projector is None else [Path(projector)])]
    tensors = Tensors(paths)
    if "--llava" in folders and vision is not None and not tensors.names(verify_source.TOWER):
        tensors = Tensors([Path(vision), *paths])
    return tensors


def compare(block: str, ours: np.ndarray, theirs: np.ndarray | None) -> Difference:
    """Compares the outputs of one block. The source's logits may have more vocabulary than ours.

    Raises:
      UserError: the source lacks the block or its shape differs.
    """
    if theirs is None:
        raise UserError(f"{block}: the source has no such block; give the MODEL's own source")
    if block == "logits":
        theirs = theirs[..., : ours.shape[-1]]
    if ours.shape != theirs.shape:
        raise UserError(
            f"{block}: is {list(ours.shape)}, the source's {list(theirs.shape)}; give the MODEL's own source"
        )
    distance = np.abs(ours.astype(np.float64) - theirs)
    rms = float(np.sqrt(np.mean(np.square(theirs, dtype=np.float64))))
    return Difference(block, float(distance.max()), float(distance.mean()), rms)


Read = Callable[[str, int | None], Layer]


@contextlib.contextmanager
def open_model(folder: Path, config: ModelConfig) -> Iterator[Read]:
    """Yields `read(part, row)`: the float32 parameters directly below `part`, or row `row` of stacked ones.

    Raises:
      UserError: the folder does not hold exactly the parameters of `config`.
    """
    with open_weights(folder, parameter_shapes(config)) as readers:

        def read(part: str, row: int | None) -> Layer:
            names = [name for name in readers if name.rpartition(".")[0] == part]
            return {
                name.rpartition(".")[2]: jnp.asarray(readers[name].read(name, row), jnp.float32)
                for name in names
            }  # fmt: skip

        yield read


def model_blocks(
    read: Read, config: ModelConfig, frames: np.ndarray, tokens: np.ndarray, *, with_projector: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and output of every block, in the order in which they run."""
    features = None  # the encoder's last block
    for name, features in _encoder_blocks(read, config, frames):
        yield name, features
    if with_projector:
        params = {"params": read("projector", None)}
        yield "projector", np.asarray(Pooler(config).apply(params, features, method="project"))
    yield from _decoder_blocks(read, config, tokens)


def _encoder_blocks(read: Read, config: ModelConfig, frames: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    vision = config.vision
    top = read("encoder", None)
    pixels = (frames / 255.0 - np.array(vision.image_mean)) / np.array(vision.image_std)
    patches = patchify(jnp.asarray(pixels, jnp.float32), vision.patch_size)
    x = patches @ top["patch_embedding"] + top["patch_bias"] + top["position_embedding"]
    yield "patch embedding", np.asarray(x)
    layer = functools.partial(encoder_layer, patches=vision.num_patches)
    step = jax.jit(functools.partial(layer, config=vision, backend=config.attention))
    for i in range(vision.depth):
        x = step(read("encoder.layers", i), x)
        yield f"encoder layer {i}", np.asarray(x)
    # The complete module too, which checks its scan and which layer's output it takes.
    encoder = SiglipEncoder(vision, "float32", config.attention)
    params = top | {"layers": read("encoder.layers", None)}
    yield "features", np.asarray(jax.jit(encoder.apply)({"params": params}, frames))


def _decoder_blocks(read: Read, config: ModelConfig, tokens: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    decoder = config.decoder
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    @jax.jit
    def step(layer: Layer, x: jax.Array) -> jax.Array:
        x, _, _ = self_attention(layer, x, positions, config=decoder, backend=config.attention)
        return mlp(layer, x, config=decoder)

    top = read("decoder", None)
    x = top["embedding"][tokens]
    yield "token embedding", np.asarray(x)
    for i in range(decoder.num_layers):
        x = step(read("decoder.layers", i), x)
        yield f"decoder layer {i}", np.asarray(x)
    x = rms_norm(x, top["final_norm"], decoder.rms_norm_eps)
    yield "final norm", np.asarray(x)
    head = top["embedding"].T if decoder.tie_embeddings else top["lm_head"]
    yield "logits", np.asarray(logits_of(x, head))
