"""What the compiler made of the programs: no T x S array in any, and the named scopes in all operations."""

import dataclasses
import itertools
import math
import re

import jax
import pytest

from crosslmm_jax import presets
from crosslmm_jax.config import MeshConfig, ModelConfig
from crosslmm_jax.parallel.mesh import make_mesh
from crosslmm_jax.profiling.record import Request
from crosslmm_jax.profiling.tasks import prefill, train

FRAMES, TEXT = 64, 101  # the length of the text is prime, and so no product of other sizes
SCOPES = ("encoder", "pool", "projector", "v2v", "t2v", "self_attention", "mlp", "head")
SHAPE = re.compile(r"\b(?:pred|bf16|[fsu]\d+)\[([\d,]+)\]")
Shape = tuple[int, ...]


def shallow_2b(attention: str = "auto") -> ModelConfig:
    """The 2B model's widths and few of its layers: two of the encoder, four of the decoder, one of these
    with cross-attention. Layers of one kind are one loop, so more of them add no array of another shape.
    Chunks have 16 frames: 32 times the width 1536 is nearly the number of keys, which would look like scores.
    """
    config = presets.crosslmm_2b()
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, num_layers=3, frame_chunk=16),
        decoder=dataclasses.replace(config.decoder, num_layers=4),
        attention=attention,
    )


def compiled_text(program, config: ModelConfig, frames: int, *, text: int = TEXT) -> str:
    """The optimised HLO, from shapes alone: no weight is ever allocated."""
    request = Request(task="prefill", system="", frames=(frames,), text=text)
    mesh = make_mesh(MeshConfig(data=1), devices=jax.devices()[:1])
    options = {"cached": False} if program is prefill else {"mesh": mesh}
    return program.case(config, request, frames, **options).lower().compile().as_text()


def shapes_in(text: str) -> set[Shape]:
    return {tuple(int(size) for size in found.split(",")) for found in SHAPE.findall(text)}


def holds_scores(shape: Shape, queries: int, keys: int, *, heads: int) -> bool:
    """Whether an array may be scores, or a mask, of all `queries` over all `keys`.

    Two signs: as many elements as all heads' scores; or axes that make up the queries next to other axes that
    make up the keys, where either may be padded (queries to less than twice, keys by less than a tenth). A
    count alone would not do: the keys of a video at the decoder's width outnumber one head's scores.
    """
    if math.prod(shape) >= heads * queries * keys:
        return True
    axes = [axis for axis, size in enumerate(shape) if size > 1]
    groups = [group for count in range(1, len(axes)) for group in itertools.combinations(axes, count)]
    size_of = {frozenset(group): math.prod(shape[axis] for axis in group) for group in groups}
    as_queries = [group for group, size in size_of.items() if queries <= size < 2 * queries]
    as_keys = [group for group, size in size_of.items() if keys <= size < 1.1 * keys]
    return any(not some & other for some in as_queries for other in as_keys)


def score_arrays(text: str, config: ModelConfig) -> set[Shape]:
    """Shapes in `text` that hold V2V's or T2V's scores, or a mask of that size."""
    keys = FRAMES * config.vision.num_patches
    heads, compact = config.decoder.num_heads, FRAMES * config.merge.tokens_per_frame
    assert (compact, keys) == (576, 46_656)
    shapes = shapes_in(text)
    v2v = {shape for shape in shapes if holds_scores(shape, compact, keys, heads=heads)}
    t2v = {shape for shape in shapes if TEXT in shape and holds_scores(shape, TEXT, keys, heads=heads)}
    return v2v | t2v


def test_the_check_knows_scores_from_keys() -> None:
    def found(*shape: int) -> bool:
        return holds_scores(shape, 576, 46_656, heads=12)

    assert found(1, 2, 6, 576, 46_656)  # all heads
    assert found(2, 6 * 576, 46_656)  # merged into one matmul
    assert found(576, 46_656)  # a mask
    assert found(64, 9, 64, 729)  # by frame
    assert found(2, 512, 46, 1024)  # padded to blocks
    assert not found(1, 64, 729, 1536)  # original tokens
    assert not found(46_656, 12, 128)  # keys
    assert not found(16, 16, 729, 729)  # scores of the encoder, a chunk of frames
    assert not found(1, 2, 6, 512, 1024)  # a block of scores
    assert not found(151_936, 1536)  # the embedding


@pytest.mark.parametrize("program", [prefill, pytest.param(train, marks=pytest.mark.slow)])
def test_no_program_holds_queries_times_keys(program) -> None:
    config = shallow_2b()
    text = compiled_text(program, config, FRAMES)
    originals = FRAMES * config.vision.num_patches * config.decoder.width
    assert originals in {math.prod(shape) for shape in shapes_in(text)}, "shapes were not read"
    assert score_arrays(text, config) == set()


def test_the_reference_holds_them_and_is_found() -> None:
    config = shallow_2b("reference")
    found = score_arrays(compiled_text(prefill, config, FRAMES), config)
    last = {shape[-2:] for shape in found}
    assert {(576, 46_656), (TEXT, 46_656)} <= last, found


@pytest.mark.slow
def test_every_part_has_its_scope() -> None:
    """A profile names the parts by these, and only by what the compiler kept of them."""
    text = compiled_text(prefill, presets.tiny(), 4, text=24)
    names = {part for path in re.findall(r'op_name="([^"]+)"', text) for part in path.split("/")}
    assert set(SCOPES) <= names
