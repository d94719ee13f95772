"""The one type of a batch: what its constructor checks and what it knows about visible frames."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from crosslmm_jax.batch import (
    BATCH_AXES,
    AllOrNone,
    Batch,
    VisibleFrames,
    VisualOnly,
    batch_axes,
    needed,
    with_known_visibility,
)

FIELDS = {
    "tokens": np.arange(10, dtype=np.int32).reshape(2, 5),
    "visual_slots": np.array([[1, 2], [3, 4]], np.int32),
    "visible_frames": np.array([[0, 2, 2, 2, 2], [0, 0, 0, 2, 2]], np.int32),
}


def test_the_rest_follows_from_the_visual_slots() -> None:
    batch = Batch.create(**FIELDS)
    assert batch.text_slots.tolist() == [[0, 3, 4], [0, 1, 2]] and batch.text_slots.dtype == np.int32
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert set(batch.arrays()) == {*FIELDS, "text_slots", "positions"}
    with pytest.raises(ValueError, match="no loss_mask"):
        needed(batch.loss_mask, "loss_mask")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokens": np.zeros((2, 5), np.int64)}, r"Batch\.tokens is int64\[2, 5\], expected int32\[2, 5\]"),
        ({"tokens": np.zeros(5, np.int32)}, r"Batch\.tokens is int32\[5\], expected int32\[5, T\]"),
        ({"loss_mask": np.zeros((2, 4), np.float32)}, r"Batch\.loss_mask is .*, expected float32\[2, 5\]"),
        ({"frames": np.zeros((3, 2, 4, 4, 3), np.uint8)}, r"expected uint8\[2, 2, 4, 4, 3\]"),
        ({"frames": np.zeros((2, 2, 4, 5, 3), np.uint8)}, r"expected uint8\[2, 2, 4, 4, 3\]"),
        ({"frame_times": np.zeros((2, 3), np.float32)}, "2 slots per row for 3 frames"),
        ({"frame_times": np.zeros((2, 0), np.float32)}, "2 slots per row for 0 frames"),
        ({"visual_slots": np.array([[1, 1], [2, 3]], np.int32)}, "share a slot"),
        ({"visual_slots": np.array([[1, 5], [2, 3]], np.int32)}, "1 to 5 in rows of 5 tokens"),
    ],
)
def test_wrong_fields_are_named(changed, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batch.create(**FIELDS | changed)


def test_what_is_known_is_part_of_the_tree_and_passes_through_programs() -> None:
    batch = Batch.create(**FIELDS)
    known = with_known_visibility(batch, 2)
    assert type(known.visible_frames) is AllOrNone
    assert jax.tree.structure(known) != jax.tree.structure(batch)
    assert type(jax.jit(lambda x: x)(known).visible_frames) is AllOrNone
    assert type(with_known_visibility(known, 3).visible_frames) is VisibleFrames
    silent = np.where(np.isin(np.arange(5), [1, 2]), 2, 0).astype(np.int32)[None]
    prompt = Batch.create(
        tokens=FIELDS["tokens"][:1], visual_slots=FIELDS["visual_slots"][:1], visible_frames=silent
    )
    assert type(with_known_visibility(prompt, 2).visible_frames) is VisualOnly


def test_every_array_has_logical_axes() -> None:
    batch = with_known_visibility(Batch.create(**FIELDS, frames=np.zeros((2, 1, 4, 4, 3), np.uint8)), 2)
    axes = batch_axes(batch)
    assert axes.loss_mask is None and axes.visible_frames == AllOrNone(BATCH_AXES["visible_frames"])
    jax.tree.map(lambda x, names: None if x.ndim == len(names) else pytest.fail(str(names)), batch, axes)


def test_batches_need_no_jax() -> None:
    program = "import sys; sys.modules['jax'] = None; import crosslmm_jax.batch"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
